"""The router monitor writes the numbers that numpy computes from what routers published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from adapter_cases import member
from cuda_waits import EVERY, Forbid
from expert_cases import FEATURES, make_chunk, make_module
from spy import SyncSpy
from toy_streams import ROWS, TOKENS, ToyModule, fit, read_tensorboard, scalar, toy_batches

from callbacks import RouterMonitor
from callbacks.logging import heat_map
from callbacks.monitor import NonFiniteError
from callbacks.router import RouterLoad
from lightning_modules.adapters import AdapterSpec
from lightning_modules.streams import FastState

CHAPTERS = {"layers.0.memory": 6, "layers.1.memory": 6, "layers.2.memory": 3}
K = 2
SCALARS = {
    "load_entropy", "dead", "max_over_mean", "balance", "entropy", "top_k_mass", "z", "changed",
}  # fmt: skip


def route(x: torch.Tensor, chapters: int) -> dict[str, torch.Tensor]:
    """Statistics of a router that decides for token t of row r if t < r + 1; row 0 never."""
    logits = 2 * x[..., :chapters]
    tokens, rows = (torch.arange(size, device=x.device) for size in (x.shape[1], len(x)))
    decides = (tokens <= rows.unsqueeze(1)) & (rows.unsqueeze(1) > 0)
    probability = logits.softmax(-1)
    chosen = probability >= probability.topk(K).values[..., -1:]
    chosen[..., chapters - 1] = False  # a chapter that nothing chooses
    some = decides.unsqueeze(-1)
    decisions = decides.sum(1)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return (values * decides).sum(1) / decisions  # NaN in row 0

    changed = (chosen[:, 1:] != chosen[:, :-1]).any(-1) & decides[:, 1:]
    return {
        "counts": (chosen & some).sum(1).float(),
        "probability": (probability * some).sum(1),
        "decisions": decisions.float(),
        "entropy": mean(torch.special.entr(probability).sum(-1)),
        "top_k_mass": mean((probability * chosen).sum(-1)),
        "z": mean(logits.logsumexp(-1).square()),
        "changed": changed.sum(1) / (decisions - 1).clamp(min=1),
    }


class RoutedToy(ToyModule):
    """Publishes the statistics of a router per layer; `history` keeps them."""

    chapters = CHAPTERS

    def forward(self, x: torch.Tensor, fast_state: FastState) -> torch.Tensor:
        if fast_state.listens("chapter_router"):
            for number, (slot, chapters) in enumerate(self.chapters.items()):
                fields = route((x + self.alpha.detach()).roll(number, 1), chapters)
                fast_state.publish("chapter_router", slot, **fields)
        if fast_state.listens("router"):
            load = x.detach().mean(1)[:, :3].softmax(-1)
            entropy = torch.special.entr(load).sum(-1)
            fast_state.publish("router", "layers.1.self_attn", load=load, entropy=entropy)
        return super().forward(x, fast_state)


class Undecided(ToyModule):
    """Its router has decided nothing: all tokens are padding."""

    def forward(self, x: torch.Tensor, fast_state: FastState) -> torch.Tensor:
        if fast_state.listens("chapter_router"):
            fields = {name: torch.zeros_like(value) for name, value in route(x, 6).items()}
            fast_state.publish("chapter_router", "layers.0.memory", **fields)
        return super().forward(x, fast_state)


def published(module: RoutedToy, topic: str, slot: str, rows: list[int]) -> list[dict]:
    chunks = [entry["published"].get(topic, {}).get(slot, {}) for entry in module.history]
    return [{n: v.double().numpy()[rows] for n, v in f.items()} for f in chunks if f]


def expected(chunks: list[dict]) -> dict[str, float]:
    """Numbers of a layer by a loop over rows."""
    rows = [{n: v[r] for n, v in f.items()} for f in chunks for r in range(len(f["decisions"]))]
    rows = [row for row in rows if row["decisions"] > 0]
    counts, total = sum(row["counts"] for row in rows), sum(row["decisions"] for row in rows)
    share, n = counts / counts.sum(), len(counts)
    numbers = {
        "load_entropy": -sum(p * np.log(p) for p in share if p > 0) / np.log(n),
        "dead": sum(c == 0 for c in counts) / n,
        "max_over_mean": counts.max() / counts.mean(),
        "balance": n * sum(share * sum(row["probability"] for row in rows) / total),
    }
    for name in ("entropy", "top_k_mass", "z"):
        numbers[name] = sum(row[name] * row["decisions"] for row in rows) / total
    pairs = sum(row["decisions"] - 1 for row in rows)
    numbers["changed"] = sum(row["changed"] * (row["decisions"] - 1) for row in rows) / pairs
    return numbers


@pytest.mark.parametrize("idle_row", [None, 2], ids=["all rows live", "row 2 out of files"])
def test_scalars_of_chapters_equal_a_loop_over_rows(tmp_path: Path, idle_row: int | None) -> None:
    module = RoutedToy()
    fit(module, toy_batches(6, idle_row=idle_row), tmp_path, [RouterMonitor(4, 1)])
    events = read_tensorboard(tmp_path)
    rows = [row for row in range(ROWS) if row != idle_row]
    for layer, slot in enumerate(CHAPTERS):
        chunks = published(module, "chapter_router", slot, rows)
        assert np.isnan(chunks[0]["entropy"][0]), "a row without a decision has no mean"
        for step, window in ((4, chunks[:8]), (6, chunks[8:])):
            numbers = expected(window)
            assert numbers.keys() == SCALARS and 0 < numbers["dead"] < 1
            assert 0 < numbers["changed"] < 1
            for name, number in numbers.items():
                written = scalar(events, f"chapter_router/{name}/layer_{layer:02d}")[step]
                # sums in float64, published values in float32
                assert written == pytest.approx(number, rel=1e-5), (name, layer, step)


def test_scalars_of_members_equal_numpy(tmp_path: Path) -> None:
    module = RoutedToy()
    fit(module, toy_batches(3, idle_row=1), tmp_path, [RouterMonitor(3, 1)])
    events = read_tensorboard(tmp_path)
    chunks = published(module, "router", "layers.1.self_attn", [0, 2, 3])
    share = np.mean([chunk["load"] for chunk in chunks], axis=(0, 1))
    numbers = {
        "load_entropy": -(share * np.log(share)).sum() / np.log(3),
        "dead": 0.0,
        "max_over_mean": share.max() * 3,
        "entropy": np.mean([chunk["entropy"] for chunk in chunks]),
    }
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("router/")]
    assert sorted(tags) == sorted(f"router/{name}/layer_01" for name in numbers)
    for name, number in numbers.items():
        assert scalar(events, f"router/{name}/layer_01")[3] == pytest.approx(number, rel=1e-5)


def test_a_balanced_router_has_entropy_and_balance_one_and_a_collapsed_one_has_not() -> None:
    from callbacks.router import _numbers

    def numbers(counts: list[float]) -> dict[str, float]:
        metric = RouterLoad(1, torch.device("cpu"), (len(counts),), ("entropy",))
        row = torch.tensor([counts])
        decisions = row.sum(1) / 2
        fields = {"counts": row, "probability": row / 2, "decisions": decisions,
                  "entropy": torch.zeros(1)}  # fmt: skip
        metric.update([fields])
        values = {n: np.atleast_1d(v.numpy()) for n, v in metric.compute().items()}
        return _numbers({n: v[0] for n, v in values.items()})

    balanced, collapsed = numbers([6.0, 6.0, 6.0, 6.0]), numbers([12.0, 12.0, 0.0, 0.0])
    assert balanced["load_entropy"] == pytest.approx(1) and balanced["balance"] == pytest.approx(1)
    assert balanced["max_over_mean"] == pytest.approx(1) and balanced["dead"] == 0
    assert collapsed["load_entropy"] == pytest.approx(0.5) and collapsed["dead"] == 0.5
    assert collapsed["balance"] == pytest.approx(2)
    assert numbers([4.0])["load_entropy"] == 1


def test_the_wrong_weight_of_rows_is_caught(tmp_path: Path) -> None:
    module = RoutedToy()
    fit(module, toy_batches(3), tmp_path, [RouterMonitor(3, 1)])
    chunks = published(module, "chapter_router", "layers.0.memory", list(range(ROWS)))
    by_row = np.nanmean([chunk["entropy"] for chunk in chunks])
    written = scalar(read_tensorboard(tmp_path), "chapter_router/entropy/layer_00")[3]
    assert written != pytest.approx(by_row, rel=1e-3)


def test_heat_maps_are_drawn_when_due_and_at_the_end(tmp_path: Path) -> None:
    fit(RoutedToy(), toy_batches(6), tmp_path, [RouterMonitor(2, 1, 4)])
    events = read_tensorboard(tmp_path)
    for tag in ("chapter_router/load", "router/load"):
        assert [event.step for event in events.Images(tag)] == [4, 6]


def test_a_heat_map_of_thousands_of_chapters_stays_small() -> None:
    few, more, many = (
        heat_map(np.ones((3, n)), ["a", "b", "c"], [*map(str, range(n))], "chapter", "load")
        for n in (10, 12, 4097)
    )
    assert more.get_figwidth() - few.get_figwidth() == pytest.approx(2 * 0.5)
    assert len(few.axes[0].get_xticks()) == 10
    assert many.get_figwidth() < 20 and 10 < len(many.axes[0].get_xticks()) <= 32
    many.canvas.draw()


def test_a_heat_map_has_room_for_the_names_of_its_rows() -> None:
    names = ["layer_00/self_attn.q_proj+k_proj+v_proj.ttt_lora", "layer_01"]
    figure = heat_map(np.ones((2, 3)), names, ["0", "1", "2"], "step", "mean")
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert min(box.x0 for box in boxes) >= 0


def test_nothing_is_written_without_a_router_or_a_decision(tmp_path: Path) -> None:
    monitor = RouterMonitor(2, 1)
    fit(ToyModule(), toy_batches(2), tmp_path / "none", [monitor])
    tags = read_tensorboard(tmp_path / "none").Tags()
    assert not [tag for tag in tags["scalars"] + tags["images"] if "router" in tag]
    fit(Undecided(), toy_batches(2), tmp_path / "empty", [monitor])
    tags = read_tensorboard(tmp_path / "empty").Tags()["scalars"]
    assert not [tag for tag in tags if tag.startswith("chapter_router")]


def test_one_decision_a_row_has_no_change(tmp_path: Path) -> None:
    batches = toy_batches(2)
    for chunk in (chunk for batch in batches for chunk in batch):
        chunk["x"] = chunk["x"][:, :1]
    fit(RoutedToy(), batches, tmp_path, [RouterMonitor(2, 1)])
    tags = read_tensorboard(tmp_path).Tags()["scalars"]
    assert "chapter_router/entropy/layer_00" in tags
    assert not [tag for tag in tags if "changed" in tag]


def test_a_router_that_diverged_stops_the_run(tmp_path: Path) -> None:
    batches = toy_batches(2)
    batches[1][0]["x"][2, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"RouterMonitor: \w+/\w+/layer_\d+ is nan at step 2"):
        fit(RoutedToy(), batches, tmp_path, [RouterMonitor(2, 1)])


class Marker(pl.Callback):
    """Labels what the spy sees with the step in which it happens."""

    def __init__(self, spy: SyncSpy) -> None:
        self.spy = spy

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.spy.label = trainer.global_step + 1


@pytest.mark.quick("bf16-mixed")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_steps_between_flushes_never_wait_and_a_flush_is_one_transfer(
    tmp_path: Path, precision: str
) -> None:
    with SyncSpy() as spy:
        fit(
            RoutedToy(), toy_batches(7, idle_row=1), tmp_path,
            [Marker(spy), RouterMonitor(3, 1, 3)], precision=precision,
        )  # fmt: skip
    for step in (1, 2, 4, 5):
        assert spy.during(step) == [], f"step {step}"
    assert spy.during(3) == spy.during(6) == ["tolist"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_step_between_flushes_waits_for_the_gpu(tmp_path: Path) -> None:
    fit(
        RoutedToy(), toy_batches(10, idle_row=2), tmp_path, [Forbid(), RouterMonitor(EVERY, 1)],
        accelerator="gpu", devices=1,
    )  # fmt: skip
    events = read_tensorboard(tmp_path)
    for topic in ("router", "chapter_router"):
        assert list(scalar(events, f"{topic}/load_entropy/layer_01"))[:2] == [4, 8]


def test_a_routed_adapter_is_watched_without_further_ado(tmp_path: Path) -> None:
    members = {"low": member("lora"), "nothing": member("noop")}
    module = make_module(
        with_ttt=False, adapters=[AdapterSpec(0, **member("routed", members=members, top_k=1))]
    )
    module.check(FEATURES)
    fit(module, [[make_chunk(0)] for _ in range(2)], tmp_path, [RouterMonitor(2, 1)], max_steps=2)
    events = read_tensorboard(tmp_path)
    assert 0 <= scalar(events, "router/load_entropy/layer_00")[2] <= 1
    assert scalar(events, "router/entropy/layer_00")[2] == pytest.approx(np.log(2), rel=0.2)


def test_statistics_of_processes_are_sums() -> None:
    fields = [route(torch.randn(ROWS, TOKENS, 8), n) for n in CHAPTERS.values()]
    halves = [[{k: v[part] for k, v in f.items()} for f in fields]
              for part in (slice(0, 1), slice(1, ROWS))]  # fmt: skip
    metrics = [
        RouterLoad(3, torch.device("cpu"), tuple(CHAPTERS.values()), ("entropy", "changed"))
        for _ in range(3)
    ]
    for metric, part in zip(metrics, (*halves, fields), strict=True):
        metric.update(part)
    assert {r.__name__ for r in metrics[0]._reductions.values()} == {"dim_zero_sum"}
    for name in metrics[0]._reductions:
        parts = getattr(metrics[0], name) + getattr(metrics[1], name)
        torch.testing.assert_close(parts, getattr(metrics[2], name), rtol=1e-12, atol=1e-12)
