"""From the command line to a policy: fit, predict, act; against loops that are written by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.loops import _PredictionLoop

import callbacks.closed_loop
from datamodules.action_chunks import RecordedSimulation
from datamodules.rollout import RolloutResult, rollout
from datamodules.simulations import get_simulation
from lightning_modules.action_expert import ActionExpertModule
from lightning_modules.policy import ActionExpertPolicy
from lightning_modules.streams import FastState, select_rows

CONFIGS = Path(__file__).parents[1] / "configs"
TINY = ("--config", str(CONFIGS / "tiny" / "action_expert.yaml"))
DATA = {"episodes": 6, "horizon": 12, "batch_size": 4, "val_fraction": 0.3}  # of the overlay


def options(name: str) -> tuple[str, ...]:
    return ("--config", str(CONFIGS / f"{name}.yaml"), *TINY)


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[RolloutResult]:
    """What closed-loop evaluation saw, in order."""
    results: list[RolloutResult] = []

    def remember(*args: Any, **options: Any) -> RolloutResult:
        results.append(rollout(*args, **options))
        return results[-1]

    monkeypatch.setattr(callbacks.closed_loop, "rollout", remember)
    return results


@pytest.mark.slow
def test_a_checkpoint_acts_as_the_evaluation_after_training_and_predicts_what_it_samples(
    run_cli, tmp_path: Path, evaluations: list[RolloutResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_cli("fit", *options("quickstart")).code == 0
    path = tmp_path / "runs" / "quickstart" / "version_0" / "checkpoints" / "last.ckpt"
    policy = ActionExpertPolicy.from_checkpoint(path)
    _assert_acts_as(policy, evaluations[-1])
    with pytest.raises(AssertionError):  # power: the weights without the EMA callback's averages
        _assert_acts_as(_with_trained_weights(policy, path), evaluations[-1])

    kept = _spy_on_predict(monkeypatch)
    result = run_cli("predict", *options("quickstart"), "--ckpt_path", str(path))
    assert kept == [None], "the predictions are in the file, not in memory"
    assert result.code == 0, result.err
    file = tmp_path / "runs" / "quickstart" / "version_1" / "predictions.parquet"
    assert str(file.relative_to(tmp_path)) in "".join((result.out + result.err).split())
    data = RecordedSimulation("FetchReach", mode="shuffled", root=str(tmp_path / "data"), **DATA)
    module = ActionExpertPolicy.from_checkpoint(path).module
    _assert_same(pq.read_table(file).to_pylist(), _by_hand(module, data))


@pytest.mark.slow
def test_predictions_of_a_carried_state_equal_a_loop_that_carries_it(
    run_cli, tmp_path: Path
) -> None:
    name = "action_expert_maze_memory"
    split = ("--data.val_fraction", "0.7", "--data.batch_size", "2")  # several files per row
    assert run_cli("fit", *options(name), *split).code == 0
    path = tmp_path / "runs" / name / "version_0" / "checkpoints" / "last.ckpt"
    file = str(tmp_path / "mine.parquet")
    writer = ["--trainer.callbacks+=PredictionWriter", f"--trainer.callbacks.path={file}"]
    result = run_cli("predict", *options(name), *split, "--ckpt_path", str(path), *writer)
    assert result.code == 0, result.err
    assert not list(tmp_path.glob("runs/**/predictions.parquet")), "one file is enough"
    data = RecordedSimulation(
        "PointMaze",
        mode="stream",
        goal_visible_chunks=(0,),
        root=str(tmp_path / "data"),
        **{**DATA, "val_fraction": 0.7, "batch_size": 2},
    )
    module = ActionExpertPolicy.from_checkpoint(path).module
    assert module.ttt_state == "carry_episode"
    rows = pq.read_table(file).to_pylist()
    _assert_same(rows, _by_hand(module, data))
    with pytest.raises(AssertionError):
        _assert_same(rows, _by_hand(module, data, carry=False))


@pytest.mark.slow
def test_without_a_checkpoint_test_says_that_the_model_is_untrained(
    run_cli, tmp_path: Path
) -> None:
    note = "note: test without --ckpt_path uses the model as it is before training"
    assert note in run_cli("test", *options("quickstart")).err
    assert run_cli("fit", *options("quickstart"), "--trainer.max_steps", "1").code == 0
    path = next(tmp_path.glob("runs/quickstart/*/checkpoints/*.ckpt"))
    none = run_cli("test", *options("quickstart"), "--ckpt_path", "last")
    assert none.code == 1
    assert "error: --ckpt_path last finds no checkpoint, since test has a run" in none.last_line
    trained = run_cli("test", *options("quickstart"), "--ckpt_path", str(path))
    assert trained.code == 0
    assert "note: " not in trained.err


@pytest.mark.slow
def test_data_of_another_size_is_an_error_that_names_both(run_cli, tmp_path: Path) -> None:
    assert run_cli("fit", *options("quickstart"), "--trainer.max_steps", "1").code == 0
    path = next(tmp_path.glob("runs/quickstart/version_0/checkpoints/*.ckpt"))
    maze = ("--data.simulation", "PointMaze", "--ckpt_path", str(path))
    result = run_cli("predict", *options("quickstart"), *maze)
    assert result.code == 1
    assert "trained with state_dim=13, the data has 7: use the data" in result.last_line
    wrong = ("--trainer.callbacks.simulation", "PointMaze")
    result = run_cli("fit", *options("quickstart"), *wrong)
    assert result.code == 1
    assert "environment has state_dim=7, the policy was trained with" in result.last_line


def _assert_acts_as(policy: ActionExpertPolicy, expected: RolloutResult) -> None:
    simulation = get_simulation("FetchReach")
    env = simulation.make()
    policy.check_environment(env)
    env.close()
    policy.reset()
    result = rollout(simulation, policy.select_actions, episodes=2, num_envs=2)
    for mine, other in zip(result.actions, expected.actions, strict=True):
        np.testing.assert_array_equal(mine, other)


def _spy_on_predict(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What Lightning's predict loop returns, in order."""
    returned: list[Any] = []
    run = _PredictionLoop.run

    def spy(self: _PredictionLoop) -> Any:
        returned.append(run(self))
        return returned[-1]

    monkeypatch.setattr(_PredictionLoop, "run", spy)
    return returned


def _with_trained_weights(policy: ActionExpertPolicy, path: Path) -> ActionExpertPolicy:
    weights = torch.load(path, weights_only=True)["current_model_state"]
    policy.module.load_state_dict(weights, strict=False)
    return policy


def _by_hand(
    module: ActionExpertModule, data: RecordedSimulation, carry: bool = True
) -> Iterator[dict[str, Any]]:
    """Predictions without Lightning, callbacks or `StreamState`."""
    data.setup("predict")
    state: dict[tuple[int, int], dict] = {}
    for number, (chunk,) in enumerate(data.predict_dataloader()):
        generator = torch.Generator().manual_seed(number)
        plan, rows = chunk["plan"], range(len(chunk["stream_id"]))
        known = [state.get((plan.stream_id[r], plan.chunk_index[r] - 1)) for r in rows]
        handle = FastState(_stack(known)) if carry and any(known) else FastState.transient()
        sampled = module.sample_actions(chunk["observation.state"], handle, generator)
        for row in rows:
            key = (plan.stream_id[row], plan.chunk_index[row])
            state[key] = select_rows(handle.outgoing, torch.tensor([row]))
            if key[0] >= 0:
                yield {
                    "episode_index": int(chunk["episode_index"][row]),
                    "frame_index": int(chunk["frame_index"][row]),
                    "action": sampled[row].tolist(),
                    "recorded_action": chunk["action"][row].tolist(),
                    "action_is_pad": chunk["action_is_pad"][row].tolist(),
                }


def _stack(rows: list[dict | None]) -> dict:
    """State of all rows from states of one row each; None is fresh."""
    example = next(row for row in rows if row)
    return {
        slot: {
            name: torch.cat([row[slot][name] if row else 0 * value for row in rows])
            for name, value in fields.items()
        }
        for slot, fields in example.items()
    }


def _assert_same(rows: list[dict[str, Any]], expected: Iterator[dict[str, Any]]) -> None:
    count = 0
    for row, wanted in zip(rows, expected, strict=True):
        assert row.keys() == wanted.keys()
        for name, value in wanted.items():
            # The same operations in the same order: not a bit may differ.
            np.testing.assert_array_equal(row[name], value, err_msg=name)
        count += 1
    assert count > 10
