"""Tiny real runs that fail in a known way, and hand-made runs for the thresholds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from toy_streams import same
from variant_cases import VARIANTS, Variant, action_expert, episodes, make_trainer, memory_bank
from variant_cases import lact as lact_module
from variant_cases import texts as text_data

from callbacks import (
    FastWeightMonitor,
    GateMonitor,
    PositionLossMonitor,
    RouterMonitor,
    RunSummary,
    Throughput,
)
from callbacks.diagnose import Curve, Run, read_run
from datamodules import TextStreamDataModule
from datamodules.documents import TextSource
from lightning_modules.adapters import TTTAdapterConfig
from lightning_modules.base import ParameterGroup
from lightning_modules.layers.ttt import TTTConfig

STEPS, FLUSH = 24, 6


def hand_made(scalars: Mapping[str, Sequence[float]], **parts: Any) -> Run:
    """A run with these values at steps 10, 20, ...; `texts` and `options` are empty by default."""
    curves = {
        tag: Curve(10 * np.arange(1, len(values) + 1), np.array(values))
        for tag, values in scalars.items()
    }
    return Run(Path("run"), curves, **{"texts": {}, "options": {}, **parts})


def monitors() -> list[pl.Callback]:
    return [
        GateMonitor(FLUSH, 1),
        FastWeightMonitor(FLUSH, 1),
        RouterMonitor(FLUSH, 1),
        PositionLossMonitor(first_bin=8),
        Throughput(FLUSH),
        LearningRateMonitor(),
    ]


def run_of(
    folder: Path,
    variant: Variant,
    *more: pl.Callback,
    watch: Callable[[], list[pl.Callback]] = monitors,
    steps: int = STEPS,
    **data: Any,
) -> Run:
    """Train, whatever happens, and read what TensorBoard has of it."""
    torch.manual_seed(0)
    logger = TensorBoardLogger(folder, name="", version="")
    trainer = make_trainer(
        folder, steps, *more, *watch(), RunSummary(),
        logger=logger, log_every_n_steps=1, limit_val_batches=20,
        val_check_interval=steps // 2, check_val_every_n_epoch=None,
    )  # fmt: skip
    try:
        trainer.fit(variant.module(), variant.data(folder, **data))
    except FloatingPointError:
        assert "NonFiniteError" in read_run(folder).texts["run/stopped"]
    return read_run(folder)


def with_ttt(layer: Mapping[str, Any] | None = None, **options: Any) -> Variant:
    """An action expert with other options of TTT, its gates frozen where they start."""
    ttt = TTTAdapterConfig(layer=TTTConfig(num_heads=2, **(layer or {})), **options)
    groups = {"gate": ParameterGroup(frozen=True)}
    return Variant(partial(_expert, ttt=ttt, groups=groups), episodes)


def _expert(**options: Any) -> Any:
    module = action_expert(groups=options["groups"])
    module.ttt = options["ttt"]
    return module


def with_rate(lr: float) -> Variant:
    """An action expert whose optimizer has this learning rate."""

    def module() -> Any:
        made = action_expert()
        made.optimizer_factory = lambda parameters: torch.optim.AdamW(parameters, lr=lr)
        return made

    return Variant(module, episodes)


def unbalanced_bank() -> Any:
    """A memory bank without balance loss, to be biased by `Biased`."""
    module = memory_bank()
    router = module.memory.memory.router
    object.__setattr__(router, "balance_coefficient", 0.0)
    object.__setattr__(router, "z_coefficient", 0.0)
    return module


class Biased(pl.Callback):
    """Two chapters are far ahead when training begins."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            if name.endswith("router.router.bias"):
                parameter.data[:2] += 20.0


class Sleepy:
    """A dataset whose disk is slow."""

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.lengths = dataset, dataset.lengths

    def __getitem__(self, request: Any) -> Any:
        time.sleep(0.3)
        return self.dataset[request]


def slow_texts(folder: Path, **options: Any) -> Any:
    data = text_data(folder, **options)
    build = data.build_dataset
    data.build_dataset = lambda stage: (Sleepy if stage == "train" else same)(build(stage))
    return data


def write_random(folder: Path, easy_from: int | None, count: int = 60) -> TextSource:
    """Files of random letters; from a place on they may be one letter alone.

    Of many lengths, so that no position tells that the file ends.
    """
    generator, texts = np.random.default_rng(0), folder / "random"
    texts.mkdir(exist_ok=True)
    for index in range(count):
        letters = [chr(97 + n) for n in generator.integers(0, 26, generator.integers(60, 400))]
        if easy_from is not None:
            letters[easy_from:] = "a" * len(letters[easy_from:])
        (texts / f"{index:02d}.txt").write_text("".join(letters))
    return TextSource("files", str(texts))


def random_texts(folder: Path, easy_from: int | None = None) -> TextStreamDataModule:
    return TextStreamDataModule(
        write_random(folder, easy_from), cache=str(folder / "cache"),
        chunk_length=24, batch_size=6, val_fraction=0.5,
    )  # fmt: skip


FAILING: dict[str, Callable[[Path], Run]] = {
    "gate shut": lambda folder: run_of(folder, with_ttt(alpha_init=0.0)),
    "gate saturated": lambda folder: run_of(folder, with_ttt(alpha_init=4.0)),
    "router collapsed": lambda folder: run_of(
        folder, Variant(unbalanced_bank, text_data), Biased()
    ),
    "inner loss": lambda folder: run_of(folder, with_ttt({"base_lr": 1e-7})),
    "state explodes": lambda folder: run_of(folder, with_ttt({"base_lr": 1e4})),
    "memory unused": lambda folder: run_of(folder, Variant(lact_module, random_texts), steps=40),
    "learning rate": lambda folder: run_of(folder, with_rate(0.0)),
    "starved": lambda folder: run_of(
        folder, Variant(lact_module, slow_texts), steps=20, batch_size=1
    ),
    "NaN": lambda folder: run_of(folder, with_rate(1e25)),
    "no monitors": lambda folder: run_of(
        folder, VARIANTS["action_expert"], watch=lambda: [Throughput(FLUSH)]
    ),
}
"""Name of the finding -> a run that was made for it."""

HEALTHY: dict[str, Callable[[Path], Run]] = {
    "action_expert": lambda folder: run_of(folder, VARIANTS["action_expert"]),
    "memory_bank": lambda folder: run_of(folder, VARIANTS["memory_bank"], steps=60),
    "lact, later parts easier": lambda folder: run_of(
        folder, Variant(lact_module, partial(random_texts, easy_from=40))
    ),
}
