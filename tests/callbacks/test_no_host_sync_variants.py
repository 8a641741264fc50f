"""With every callback on, no variant's training step waits for the device more than without."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from spy import SyncSpy
from variant_cases import STEPS, VARIANTS, every_variant, make_trainer
from window_cases import recompute_layers

from callbacks import (
    EMA,
    FastWeightMonitor,
    GateMonitor,
    PositionLossMonitor,
    RouterMonitor,
    RunSummary,
    Throughput,
)

EVERY = 4
FREE = [step for step in range(2, STEPS) if step % EVERY]
"""Steps without a flush. The first may wait: what it does is done once."""

RECOMPUTED_WAITS = ("memory_bank", "ttt_lora", "in_place")
"""Variants on models of transformers. With activation checkpointing these look, once a step,
whether rows are packed; otherwise nothing of a step waits."""


class Marker(pl.Callback):
    """Labels what the spy sees with the step in which it happens; the loader is not a step."""

    def __init__(self, spy: SyncSpy) -> None:
        self.spy = spy

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.spy.label = trainer.global_step + 1


class LastMarker(Marker):
    """Behind all other callbacks: what follows is logging and loading."""

    def on_train_batch_start(self, *args: Any) -> None:
        pass

    def on_train_batch_end(self, *args: Any) -> None:
        self.spy.label = "between steps"


def every_callback() -> list[pl.Callback]:
    kinds = (GateMonitor, FastWeightMonitor, RouterMonitor)
    monitors = [monitor(EVERY, 1, EVERY) for monitor in kinds]
    return [*monitors, PositionLossMonitor(), Throughput(EVERY), EMA(), RunSummary()]


class CountsLayers(pl.Callback):
    """How often the first layer's MLP ran."""

    calls = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        found = [m for name, m in pl_module.named_modules() if name.endswith("layers.0.mlp")]
        found[0].register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.calls += 1


def spy_on(name: str, folder: Path, recompute: bool, callbacks: list[pl.Callback]) -> SyncSpy:
    torch.manual_seed(0)
    spy, module, data = SyncSpy(), VARIANTS[name].module(), VARIANTS[name].data(folder)
    trainer = make_trainer(
        folder, STEPS, Marker(spy), *callbacks, LastMarker(spy),
        logger=TensorBoardLogger(folder, name="", version="", max_queue=10000),
        log_every_n_steps=1000, gradient_clip_val=1.0,
    )  # fmt: skip
    # On a CPU, Adam reads its count of steps, which on a GPU lies in the host's memory.
    module.optimizer_factory = partial(torch.optim.SGD, lr=0.01)
    if recompute:
        recompute_when_built(module)
    with spy:
        trainer.fit(module, data)
    return spy


def recompute_when_built(module: Any) -> None:
    """Turn activation checkpointing on as soon as there is a model."""
    build = module.build

    def build_with(*args: Any) -> None:
        build(*args)
        recompute_layers(module)

    module.build = build_with


@pytest.mark.slow
@every_variant
@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "checkpointing"])
def test_callbacks_add_no_wait_to_the_steps_between_flushes(
    name: str, recompute: bool, tmp_path: Path
) -> None:
    layers = CountsLayers()
    watched = spy_on(name, tmp_path, recompute, [*every_callback(), layers])
    alone = spy_on(name, tmp_path, recompute, [])
    assert layers.calls == STEPS * (1 + recompute) + 1  # once to count FLOPs, without memory
    for step in FREE:
        assert watched.during(step) == alone.during(step), f"step {step}"
        waits = ["_local_scalar_dense"] if recompute and name in RECOMPUTED_WAITS else []
        assert alone.during(step) == waits, f"step {step}"
    # At a flush, one transfer per monitor that has something to write, and nothing else.
    flush = Counter(watched.during(EVERY)) - Counter(alone.during(EVERY))
    assert flush in ({"tolist": 1}, {"tolist": 2}), flush


class ReadsTheLoss(pl.Callback):
    """The mistake: a callback that looks at a number in every step."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        outputs["loss"].item()


def test_the_spy_sees_a_callback_that_reads_the_loss(tmp_path: Path) -> None:
    spy = spy_on("action_expert", tmp_path, False, [ReadsTheLoss()])
    assert all(spy.during(step) == ["_local_scalar_dense"] for step in FREE)
