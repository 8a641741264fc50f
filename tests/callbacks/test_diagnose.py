"""`python -m callbacks.diagnose` finds what is wrong with a run, and nothing where nothing is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diagnose_cases import FAILING, HEALTHY, hand_made
from toy_streams import ToyModule, fit, toy_batches

from callbacks import FastWeightMonitor, GateMonitor, RunSummary
from callbacks.diagnose import RULES, Finding, Run, diagnose, read_run
from callbacks.diagnose.__main__ import main
from callbacks.diagnose.report import report


def names(run: Run) -> set[str]:
    return {finding.name for finding in diagnose(run)}


WATCHED = {"fast_weight/reset_share": [0.1]}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAILING)
def test_a_real_run_that_was_made_to_fail_is_found(name: str, tmp_path: Path) -> None:
    run = FAILING[name](tmp_path)
    found = {finding.name: finding for finding in diagnose(run)}
    assert name in found
    assert any(digit.isdigit() for digit in found[name].evidence)
    # What else is wrong follows from it: chapters that a collapsed router never chooses are dead.
    follows = {"router collapsed": {"dead choices"}}.get(name, set())
    assert found.keys() == {name} | follows


@pytest.mark.slow
@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_found_in_a_healthy_real_run(name: str, tmp_path: Path) -> None:
    run = HEALTHY[name](tmp_path)
    assert diagnose(run) == []
    assert "Nothing looks wrong." in report(run, [])


CASES: dict[str, tuple[dict[str, list[float]], dict[str, list[float]]]] = {
    "gate shut": (
        {"gate/ttt/max/layer_00": [0.009], "gate/ttt/min/layer_00": [-0.01]},
        {"gate/ttt/max/layer_00": [0.009], "gate/ttt/min/layer_00": [-0.011]},
    ),
    "gate saturated": (
        {"gate/ttt/saturation/layer_00": [0.0, 0.0, 0.6, 0.6, 0.6]},
        {"gate/ttt/saturation/layer_00": [0.9, 0.9, 0.6, 0.5, 0.3]},
    ),
    "router collapsed": (
        {"router/load_entropy/layer_00": [0.9, 0.4, 0.5, 0.4]},
        {"router/load_entropy/layer_00": [0.4, 0.5, 0.5, 0.6]},
    ),
    "dead choices": (
        {"chapter_router/dead/layer_00": [0.0, 0.3, 0.3, 0.3]},
        {"chapter_router/dead/layer_00": [0.5, 0.2, 0.2, 0.3]},
    ),
    "inner loss": (
        {"fast_weight/inner_loss_before/l": [-1.0], "fast_weight/inner_loss_after/l": [-0.9]},
        {"fast_weight/inner_loss_before/l": [-1.0], "fast_weight/inner_loss_after/l": [-1.1]},
    ),
    "state explodes": (
        {"fast_weight/relative_change_max/l": [0.1, 4.0, 4.0, 4.0]},
        {"fast_weight/relative_change_max/l": [0.1, 2.0, 2.0, 4.0]},
    ),
    "learning rate": (
        {"lr/base": [0.1, 0.1], "lr/gate/no_decay": [0.0, 0.0]},
        {"lr/base": [0.1, 0.0], "lr/gate/no_decay": [0.1, 0.0]},
    ),
    "starved": (
        {"throughput/data_wait": [0.0, 0.6, 0.6, 0.2]},
        {"throughput/data_wait": [0.9, 0.6, 0.2, 0.2]},
    ),
    "NaN": ({"train/loss": [1.0, float("nan")]}, {"train/loss": [1.0, 2.0]}),
    "no monitors": ({"train/loss": [1.0]}, {"train/loss": [1.0], **WATCHED}),
}
"""Finding -> curves just beyond its threshold, and just within."""


@pytest.mark.parametrize("name", CASES)
def test_thresholds_by_hand(name: str) -> None:
    beyond, within = CASES[name]
    watched = {} if name == "no monitors" else WATCHED
    assert names(hand_made({**watched, **beyond})) == {name}
    assert names(hand_made({**watched, **within})) == set()


def test_beside_an_exploded_state_no_larger_inner_rate_is_advised() -> None:
    same = {f"fast_weight/inner_loss_{when}/l": [2.0] for when in ("before", "after")}
    assert names(hand_made(same)) == {"inner loss"}
    huge = {"fast_weight/relative_change_max/l": [5000.0]}
    assert names(hand_made(same | huge)) == {"state explodes"}


def test_attention_and_its_own_gates_are_no_memory() -> None:
    gates = {"gate/attn/max/l": [0.0], "gate/alpha/max/l": [0.0], "gate/ratio_ttt/max/l": [0.0]}
    assert names(hand_made(gates)) == set()


def test_one_open_layer_is_enough() -> None:
    gates = {"gate/ttt/max/layer_00": [0.0], "gate/ttt/max/layer_01": [0.2]}
    assert names(hand_made(gates)) == set()


POSITIONS = {
    "position_loss/from_000000": [3.0, 3.0],
    "position_loss/from_000064": [2.0, 2.0],
    "position_loss/from_000128": [1.9, 1.99],
    **WATCHED,
}


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"data.chunk_length": 128}, True),
        ({"data.chunk_length": 128, "model.config.window_size": 64}, False),  # 3.0 -> 1.99
        ({"data.chunk_length": 512}, False),  # attention sees all of it
        ({"data.chunk_length": 128, "model.fast_state": "reset"}, False),  # forgets on purpose
        ({}, False),
    ],
)
def test_memory_is_unused_where_the_loss_is_flat_beyond_the_reach_of_attention(
    options: dict[str, Any], found: bool
) -> None:
    assert names(hand_made(POSITIONS, options=options)) == ({"memory unused"} if found else set())


def test_what_was_stopped_on_purpose_is_no_finding_and_an_error_is() -> None:
    cases = {"KeyboardInterrupt": set(), "SIGTERMException": set(), "OutOfMemoryError": {"stopped"}}
    for text, found in cases.items():
        run = hand_made(WATCHED, texts={"run/stopped": f"Stopped at step 3. {text}"})
        assert names(run) == found


def test_a_control_whose_monitors_have_nothing_to_write_is_watched() -> None:
    options = {"trainer.callbacks": "GateMonitor, Throughput"}
    assert names(hand_made({"train/loss": [1.0]}, options=options)) == set()


def test_every_finding_has_evidence_and_a_config_key() -> None:
    for beyond, _ in CASES.values():
        for finding in diagnose(hand_made(beyond)):
            assert any(character.isdigit() for character in finding.evidence), finding
            known = ("model.init_args.", "data.init_args.", "trainer.", "adapters")
            assert any(key in finding.knob for key in known), finding


def test_every_rule_has_a_case() -> None:
    assert len(RULES) == 12
    found = {
        finding.name for beyond, _ in CASES.values() for finding in diagnose(hand_made(beyond))
    }
    assert found | {"stopped", "memory unused"} == {*FAILING, "stopped", "dead choices"}


def test_report_names_what_was_not_looked_at() -> None:
    text = report(hand_made(WATCHED), [Finding("x", "Says.", "seen 3", "turn")])
    assert "gates (GateMonitor)" in " ".join(text.partition("no curves: ")[2].split())
    assert "1. x: Says.\n   seen: seen 3\n   turn: turn" in text


# --- the command ---


def test_exit_codes_of_a_run_with_and_without_findings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callbacks = [GateMonitor(2), FastWeightMonitor(2), RunSummary()]
    fit(ToyModule(depth=1), toy_batches(4), tmp_path / "healthy", callbacks)
    assert main([str(tmp_path / "healthy")]) == 0
    assert "Nothing looks wrong." in capsys.readouterr().out
    fit(ToyModule(depth=1), toy_batches(2), tmp_path / "blind", [])
    assert main([str(tmp_path / "blind")]) == 1
    assert "1. no monitors" in capsys.readouterr().out


def test_bad_input_is_code_2_and_the_error_names_cause_and_fix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "none")]) == 2
    assert "is no folder: give the folder of a run" in capsys.readouterr().err
    fit(ToyModule(depth=1), toy_batches(1), tmp_path / "runs" / "x" / "version_3", [RunSummary()])
    assert main([str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "has no TensorBoard file" in error
    assert f"e.g. {tmp_path / 'runs' / 'x' / 'version_3'}," in error
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2


def test_a_run_that_was_resumed_in_its_folder_is_one_run(tmp_path: Path) -> None:
    for steps in (2, 4):
        callbacks = [FastWeightMonitor(2, 1)]
        fit(ToyModule(depth=1), toy_batches(steps), tmp_path, callbacks)
    curve = read_run(tmp_path).scalars["fast_weight/reset_share"]
    assert curve.steps.tolist() == [2, 4]
