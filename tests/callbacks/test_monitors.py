"""Monitors write the numbers that numpy computes from what the module published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from toy_streams import ROWS, ToyModule, fit, read_tensorboard, scalar, toy_batches

from callbacks import FastWeightMonitor, GateMonitor, Throughput
from callbacks.monitor import NonFiniteError, layer_tag, layer_tags

SLOT = "layers.1.self_attn"
LIVE = {"all rows live": None, "row 2 out of files": 2}


def published(module: ToyModule, topic: str, name: str, slot: str = SLOT) -> list[np.ndarray]:
    """What the module published, one array per chunk."""
    found = [entry["published"].get(topic, {}).get(slot, {}) for entry in module.history]
    return [fields[name].double().numpy() for fields in found if name in fields]


def live_rows(idle_row: int | None) -> list[int]:
    return [row for row in range(ROWS) if row != idle_row]


@pytest.mark.quick("row 2 out of files")
@pytest.mark.parametrize("idle_row", LIVE.values(), ids=LIVE.keys())
def test_gate_scalars_equal_numpy_over_all_steps_of_a_flush(
    tmp_path: Path, idle_row: int | None
) -> None:
    module = ToyModule()
    fit(
        module,
        toy_batches(6, idle_row=idle_row),
        tmp_path,
        [GateMonitor(4, observe_every_n_steps=1)],
    )
    events = read_tensorboard(tmp_path)
    rows = live_rows(idle_row)
    for tag, name in (("attn", "gate_attn"), ("ttt", "gate_ttt"), ("ratio_ttt", "ratio_ttt")):
        chunks = [value[rows] for value in published(module, "gate", name)]
        for step, window in ((4, chunks[:8]), (6, chunks[8:])):
            values = np.stack(window)
            expected = {
                "mean": values.mean(), "std": values.std(), "min": values.min(),
                "max": values.max(), "saturation": (np.abs(values) > 0.99).mean(),
            }  # fmt: skip
            if tag.startswith("ratio"):
                assert f"gate/{tag}/saturation/layer_01" not in events.Tags()["scalars"]
                del expected["saturation"]
            for key, number in expected.items():
                written = scalar(events, f"gate/{tag}/{key}/layer_01")[step]
                assert written == pytest.approx(number, rel=1e-5, abs=1e-7), (tag, key, step)
    alpha = np.tanh(0.3)
    assert scalar(events, "gate/alpha/max/layer_00")[4] >= alpha * 0.5


def test_gate_histogram_holds_the_last_steps_gates(tmp_path: Path) -> None:
    module = ToyModule()
    fit(module, toy_batches(4), tmp_path, [GateMonitor(4, observe_every_n_steps=1)])
    event = read_tensorboard(tmp_path).Histograms("gate/ttt/histogram/layer_01")[0]
    values = np.stack(published(module, "gate", "gate_ttt")[-2:])
    edges = np.linspace(-1.5, 1.5, 61).astype(np.float32).astype(np.float64)
    expected, _ = np.histogram(values, edges)
    assert event.histogram_value.num == values.size
    counts = dict(
        zip(event.histogram_value.bucket_limit, event.histogram_value.bucket, strict=True)
    )
    for limit, count in zip(np.linspace(-1.5, 1.5, 61)[1:], expected, strict=True):
        written = sum(n for edge, n in counts.items() if abs(edge - limit) < 1e-6)
        assert written == count


def test_reset_share_counts_the_steps_that_are_not_observed(tmp_path: Path) -> None:
    module = ToyModule()
    fit(module, toy_batches(4), tmp_path, [FastWeightMonitor(4, observe_every_n_steps=4)])
    first = np.mean([entry["chunk"]["is_first"].numpy() for entry in module.history])
    written = scalar(read_tensorboard(tmp_path), "fast_weight/reset_share")
    assert written[4] == pytest.approx(first)


@pytest.mark.parametrize("idle_row", LIVE.values(), ids=LIVE.keys())
def test_fast_weight_scalars_equal_numpy(tmp_path: Path, idle_row: int | None) -> None:
    module = ToyModule()
    monitor = FastWeightMonitor(3, observe_every_n_steps=1)
    fit(module, toy_batches(3, idle_row=idle_row), tmp_path, [monitor])
    events = read_tensorboard(tmp_path)
    rows = live_rows(idle_row)
    norm = np.stack([value[rows] for value in published(module, "fast_weight", "state_norm")])
    eta = np.stack([value[rows] for value in published(module, "fast_weight", "eta")])
    before = np.stack([value[rows] for value in published(module, "inner_loss", "before")])
    first = [entry["chunk"]["is_first"].numpy()[rows] for entry in module.history]
    expected = {
        "state_norm/layer_01": norm.mean(),
        "relative_change/layer_01": norm.mean() / 3,
        "relative_change_max/layer_01": norm.max() / 3,
        "cosine/layer_01": np.cos(norm).mean(),
        "eta/layer_01": eta.mean(),
        "inner_loss_before/layer_01": before.mean(),
        "inner_loss_after/layer_01": before.mean() / 2,
        "reset_share": np.mean(first),
    }
    for tag, number in expected.items():
        assert scalar(events, f"fast_weight/{tag}")[3] == pytest.approx(number, rel=1e-5), tag


def test_inner_loss_is_published_in_flush_steps_only(tmp_path: Path) -> None:
    module = ToyModule()
    fit(module, toy_batches(7), tmp_path, [FastWeightMonitor(every_n_steps=3)])
    steps = [i // 2 + 1 for i, entry in enumerate(module.history)
             if "inner_loss" in entry["published"]]  # fmt: skip
    assert steps == [3, 3, 6, 6]
    assert module.streams.listening == set()


def test_steps_that_are_not_observed_publish_nothing(tmp_path: Path) -> None:
    module = ToyModule()
    monitor = FastWeightMonitor(every_n_steps=5, observe_every_n_steps=2)
    fit(module, toy_batches(7), tmp_path, [monitor])
    steps = [i // 2 + 1 for i, entry in enumerate(module.history) if entry["published"]]
    assert sorted(set(steps)) == [3, 4, 5, 7]  # places 1, 0, flush, 1 in windows of 2
    norms = published(module, "fast_weight", "state_norm")
    written = scalar(read_tensorboard(tmp_path), "fast_weight/state_norm/layer_01")
    assert written[5] == pytest.approx(np.stack(norms[:6]).mean(), rel=1e-5)
    assert written[7] == pytest.approx(np.stack(norms[6:]).mean(), rel=1e-5)


@pytest.mark.parametrize("period", [2, 4, 5, 10, 20])
def test_every_chunk_of_equally_long_files_is_observed(period: int) -> None:
    monitor = GateMonitor(every_n_steps=1000, observe_every_n_steps=20)
    observed = [step for step in range(4000) if monitor._looks(step)]
    assert len(observed) == 200
    assert {step % period for step in observed} == set(range(period))


def test_nothing_is_published_without_a_monitor(tmp_path: Path) -> None:
    module = ToyModule()
    fit(module, toy_batches(2), tmp_path, [])
    assert all(entry["published"] == {} for entry in module.history)


def test_figures_are_drawn_when_due_and_at_the_end(tmp_path: Path) -> None:
    monitors = [GateMonitor(2, 1, 4), FastWeightMonitor(2, 1, 4)]
    fit(ToyModule(depth=1), toy_batches(6), tmp_path, monitors)
    images = read_tensorboard(tmp_path)
    for tag in ("gate/ttt/by_time", "gate/ratio_ttt/by_time", "fast_weight/state_norm/by_chunk"):
        assert [event.step for event in images.Images(tag)] == [4, 6]


def test_accumulated_batches_flush_once_per_optimizer_step(tmp_path: Path) -> None:
    module = ToyModule()
    monitor = FastWeightMonitor(2, observe_every_n_steps=1)
    fit(module, toy_batches(8), tmp_path, [monitor], accumulate_grad_batches=2)
    norms = published(module, "fast_weight", "state_norm")
    written = scalar(read_tensorboard(tmp_path), "fast_weight/state_norm/layer_01")
    assert list(written) == [2, 4]
    assert written[4] == pytest.approx(np.stack(norms[8:]).mean(), rel=1e-5)


def test_bf16_training_gives_finite_scalars_of_every_layer(tmp_path: Path) -> None:
    monitors = [GateMonitor(2), FastWeightMonitor(2)]
    fit(ToyModule(), toy_batches(2), tmp_path, monitors, precision="bf16-mixed")
    events = read_tensorboard(tmp_path)
    for layer in range(3):
        for tag in ("gate/attn/mean", "fast_weight/state_norm"):
            assert np.isfinite(scalar(events, f"{tag}/layer_{layer:02d}")[2])


def test_nan_in_a_fast_state_stops_at_the_flush_and_names_its_place(tmp_path: Path) -> None:
    module = ToyModule()
    module.poison = (5, "layers.2.self_attn", 3)  # second chunk of the third step
    with pytest.raises(NonFiniteError) as error:
        fit(module, toy_batches(8), tmp_path, [FastWeightMonitor(4, observe_every_n_steps=1)])
    message = str(error.value)
    stream = int(module.history[5]["chunk"]["stream_id"][3])
    for part in ("layers.2.self_attn", "layer_02", "row 3", f"stream {stream}", "at step 3"):
        assert part in message
    assert "checked at step 4" in message
    assert len(module.history) == 8  # steps 1 to 4 ran, two chunks each


def test_infinite_ratio_is_named_by_the_gate_monitor(tmp_path: Path) -> None:
    module = ToyModule()
    batches = toy_batches(2)
    batches[0][0]["x"][1] = 0.0  # |gate * branch| / 0
    with pytest.raises(NonFiniteError, match=r"layers\.0\.self_attn.*row 1, stream 10, at step 1"):
        fit(module, batches, tmp_path, [GateMonitor(2, observe_every_n_steps=1)])


def test_layer_tags_by_hand() -> None:
    assert layer_tag("layers.3.self_attn") == "layer_03"
    assert layer_tag("model.model.dit.layers.12.self_attn") == "layer_12"
    assert layer_tag("ttt") == "ttt"
    assert layer_tags(["a.layers.3.q", "a.layers.3.k", "a.layers.4.q"]) == [
        "layer_03/q", "layer_03/k", "layer_04",
    ]  # fmt: skip
    assert layer_tags(["a.layers.3.q", "b.layers.3.q", "b.layers.3.k"]) == [
        "layer_03/a.layers.3.q", "layer_03/b.layers.3.q", "layer_03/k",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["every_n_steps", "observe_every_n_steps", "figure_every_n_steps"])
def test_zero_steps_are_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0"):
        GateMonitor(**{name: 0})


def test_tensorboard_has_these_tags(tmp_path: Path) -> None:
    batches = toy_batches(3)
    for chunk in (chunk for batch in batches for chunk in batch):
        chunk["action"] = torch.zeros(ROWS, 6, 2)
    callbacks = [GateMonitor(2), FastWeightMonitor(2), Throughput(2)]
    fit(ToyModule(depth=1), batches, tmp_path, callbacks, log_every_n_steps=2)
    tags = read_tensorboard(tmp_path).Tags()
    gates = {
        f"gate/{gate}/{key}/layer_00"
        for gate in ("attn", "ttt", "alpha")
        for key in ("mean", "std", "min", "max", "saturation")
    }
    ratios = {
        f"gate/{ratio}/{key}/layer_00"
        for ratio in ("ratio_attn", "ratio_ttt")
        for key in ("mean", "std", "min", "max")
    }
    fast = {
        f"fast_weight/{name}/layer_00"
        for name in (
            "state_norm", "relative_change", "relative_change_max", "cosine", "eta",
            "inner_loss_before", "inner_loss_after",
        )
    } | {"fast_weight/reset_share"}  # fmt: skip
    rates = {f"throughput/{name}_per_sec" for name in ("batches", "samples", "tokens")}
    streams = {"streams/resets", "streams/continuations"}
    lightning = {"train/loss", "epoch", "hp_metric"}
    assert set(tags["scalars"]) - lightning == gates | ratios | fast | rates | streams
    assert set(tags["histograms"]) == {
        f"gate/{gate}/histogram/layer_00" for gate in ("attn", "ttt", "alpha")
    }
    of_calls = ("attn", "ttt", "ratio_attn", "ratio_ttt")
    by_time = {f"gate/{name}/by_time" for name in of_calls}
    by_step = {f"gate/{name}/by_step" for name in ("alpha", *of_calls)}
    fast = {"fast_weight/state_norm/by_chunk", "fast_weight/inner_loss/by_layer"}
    assert set(tags["images"]) == by_time | by_step | fast
