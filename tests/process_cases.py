"""Every variant in two processes, and in one process that reads the streams of both."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lact_module_cases import adamw, save_pretrained
from torch import Tensor
from variant_cases import VARIANTS, Interrupted, SaveAndStop, make_trainer

from lightning_modules.base import AdapterModule
from lightning_modules.layers.ttt_lora import TTTLoRAOptions
from lightning_modules.models.flow_matching import time_quantile
from lightning_modules.models.pretrained import PretrainedOptions
from lightning_modules.models.ttt_lora import TTTLoRAPlacement
from lightning_modules.streams import StreamPlan
from lightning_modules.ttt_lora import TTTLoRAModule

STEPS = 5
STOP = 3
"""Behind this batch a run is interrupted: files are in their middle."""

CLIP = 0.01
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
"""float64: sums in another order, through five steps of AdamW."""

VALIDATED = {
    "limit_val_batches": 2,
    "val_check_interval": 3,
    "check_val_every_n_epoch": None,
}


def whole(value: Tensor) -> Tensor:
    """A copy of a tensor, put together if it is sharded."""
    full = getattr(value, "full_tensor", lambda: value)()
    return full.detach().clone()


class Record(pl.Callback):
    """What a run has computed: losses, gradients before and after clipping, metrics.

    `start` are the weights with which it began; `seed` is that of the noise.
    """

    KEPT = ("losses", "gradients", "clipped", "metrics", "start", "optimizer", "seed")

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.clipped: list[dict[str, Tensor]] = []
        self.metrics: list[dict[str, float]] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.start = weights_of(module)
        self.optimizer = moments_of(trainer.optimizers[0], module)
        self.seed = torch.initial_seed()

    def on_before_optimizer_step(self, trainer: Any, module: Any, *args: Any) -> None:
        self.gradients.append(gradients_of(module))

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.losses.append(outputs["loss"].item())
        self.clipped.append(gradients_of(module))
        self.metrics.append({k: v.item() for k, v in trainer.callback_metrics.items()})


def weights_of(module: AdapterModule) -> dict[str, Tensor]:
    return {name: whole(value) for name, value in module.state_dict().items()}


def moments_of(optimizer: Any, module: AdapterModule) -> dict[str, Tensor]:
    """First moments of Adam, by the name of the parameter."""
    return {
        name: whole(optimizer.state[p]["exp_avg"])
        for name, p in module.named_parameters()
        if p in optimizer.state
    }


def gradients_of(module: AdapterModule) -> dict[str, Tensor]:
    return {n: whole(p.grad) for n, p in module.named_parameters() if p.grad is not None}


def noise_of_rows(chunk: Any, actions: Tensor, generator: Any) -> tuple[Tensor, Tensor]:
    """`ActionExpertModule.draw` by what a row reads, wherever it stands in a batch."""
    noise, time = [], []
    for row in zip(*chunk["plan"][:2], strict=True):
        own = torch.Generator().manual_seed(zlib.crc32(repr(row).encode()))
        noise.append(torch.randn(actions.shape[1:], generator=own, dtype=torch.float64))
        time.append(torch.rand((), generator=own, dtype=torch.float64))
    return torch.stack(noise), time_quantile(torch.stack(time))


def make_double(name: str, **options: Any) -> AdapterModule:
    """A variant in float64 whose rows draw the same noise in every process."""
    torch.manual_seed(0)
    module = VARIANTS[name].module(**options)
    build = module.build_for

    def build_double(datamodule: Any) -> None:
        torch.manual_seed(1)
        build(datamodule)
        module.double()

    module.build_for = build_double
    if name == "action_expert":
        module.draw = noise_of_rows
    return module


class Merged:
    """Batches whose rows are those of several loaders, one after the other."""

    batch_sampler = None

    def __init__(self, loaders: list[Any]) -> None:
        self.loaders = loaders
        self.sampler = SimpleNamespace(set_epoch=self._set_epoch)

    def _set_epoch(self, epoch: int) -> None:
        for loader in self.loaders:
            loader.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.loaders[0])

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        for batches in zip(*self.loaders, strict=True):
            yield [merge(chunks) for chunks in zip(*batches, strict=True)]


def merge(chunks: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    merged = dict(chunks[0])
    for key, value in chunks[0].items():
        values = [chunk[key] for chunk in chunks]
        if isinstance(value, Tensor):
            merged[key] = torch.cat(values)
        elif key == "plan":
            merged[key] = StreamPlan(*(sum(parts, ()) for parts in zip(*values, strict=True)))
        elif key == "padded":
            merged[key] = any(values)
        elif key == "token_counts":
            merged[key] = sum(values, ())
    return merged


class BothRanks(pl.LightningDataModule):
    """What ranks 0 and 1 of two read, in one process."""

    def __init__(self, data: pl.LightningDataModule) -> None:
        super().__init__()
        self.data = data

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["data"], name)

    def prepare_data(self) -> None:
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        self.data.setup(stage)

    def train_dataloader(self) -> Merged:
        return self._merged("train_dataloader")

    def val_dataloader(self) -> Merged:
        return self._merged("val_dataloader")

    def _merged(self, loader: str) -> Merged:
        loaders = []
        for rank in (0, 1):
            self.data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
            loaders.append(getattr(self.data, loader)())
        return Merged(loaders)


def run(
    module: AdapterModule, data: pl.LightningDataModule, folder: Path, *callbacks: Any, **kw: Any
) -> dict[str, Any]:
    """Train, and return what came of it as plain values.

    Args:
        module: is trained.
        data: its data.
        folder: of the trainer.
        *callbacks: further ones.
        **kw: of the trainer, and `steps` and `ckpt_path`.
    """
    record, ckpt_path = Record(), kw.pop("ckpt_path", None)
    trainer = make_trainer(folder, kw.pop("steps", STEPS), record, *callbacks, **kw)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return {
        **{name: getattr(record, name) for name in Record.KEPT},
        "weights": weights_of(module),
        "streams": module.streams.state_dict(),
    }


def stop(
    module: AdapterModule,
    data: pl.LightningDataModule,
    folder: Path,
    path: Path,
    *callbacks: Any,
    **kw: Any,
) -> None:
    """Train to a batch (`STOP`), save a checkpoint, and lose the process's memory."""
    with pytest.raises(Interrupted):
        run(module, data, folder, *callbacks, SaveAndStop(STOP, path), **kw)


def accumulated(folder: Path, **options: Any) -> dict[str, Any]:
    """Two batches in a step: a run, and the one that was stopped between them and resumed."""
    options, path = {**options, "accumulate_grad_batches": 2, "steps": 3}, folder / "open.ckpt"

    def data() -> pl.LightningDataModule:
        return VARIANTS["lact"].data(folder / "lact")

    never_stopped = run(make_double("lact"), data(), folder, **options)
    stop(make_double("lact"), data(), folder, path, **options)
    again = run(make_double("lact"), data(), folder, ckpt_path=path, **options)
    return {"whole": never_stopped, "again": again}


def join_processes(rank: int, strategy: Any = "ddp") -> dict[str, Any]:
    """Options of the trainer of one of two processes, for a function of `in_two_processes`."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    return {"strategy": strategy, "devices": 2}


TRAINER = {**VALIDATED, "gradient_clip_val": CLIP}


def one_process(name: str, folder: Path, **data: Any) -> dict[str, Any]:
    """The streams of both ranks, read by one process."""
    return run(make_double(name), BothRanks(VARIANTS[name].data(folder, **data)), folder, **TRAINER)


def adapted(base: str) -> TTTLoRAModule:
    """TTT-LoRA in a frozen pretrained model, of which checkpoints hold the adapters alone."""
    torch.manual_seed(0)
    return TTTLoRAModule(
        adamw,
        pretrained=PretrainedOptions(base),
        ttt_lora=TTTLoRAPlacement(inner_dim=4, learner=TTTLoRAOptions(mini_batch_size=5)),
    )


def prepared(folder: Path) -> Path:
    """With the data of every variant, and a pretrained model."""
    for name, variant in VARIANTS.items():
        (folder / name).mkdir()
        variant.data(folder / name).prepare_data()
    save_pretrained(folder)
    return folder


def saved(folder: Path, name: str) -> list[dict[str, Any]]:
    """What ranks 0 and 1 have saved as `{name}_{rank}.pt`."""
    return [torch.load(folder / f"{name}_{rank}.pt", weights_only=False) for rank in (0, 1)]


def assert_resumed(part: dict[str, Any], never_stopped: dict[str, Any]) -> None:
    """Losses, weights and streams of a resumed run, bit for bit."""
    assert part["losses"] == never_stopped["losses"][STOP:]
    for name, value in never_stopped["weights"].items():
        assert torch.equal(part["weights"][name], value), name
    one, other = part["streams"], never_stopped["streams"]
    assert {k: v for k, v in one.items() if k != "slots"} == {
        k: v for k, v in other.items() if k != "slots"
    }
    for slot, fields in other["slots"].items():
        assert all(torch.equal(one["slots"][slot][n], value) for n, value in fields.items())


def assert_equal_to_one(parts: list[dict[str, Any]], one: dict[str, Any]) -> None:
    """Losses, gradients, weights, and the fast states row by row."""
    losses = torch.tensor([part["losses"] for part in parts], dtype=torch.float64).mean(0)
    expected = torch.tensor(one["losses"], dtype=torch.float64)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-7)  # float32 losses
    for part in parts:
        for what in ("gradients", "clipped"):
            for mine, other in zip(part[what], one[what], strict=True):
                torch.testing.assert_close(mine, other, **CLOSE)
        torch.testing.assert_close(part["weights"], one["weights"], **CLOSE)
    assert_rows_equal([part["streams"] for part in parts], one["streams"])


def assert_rows_equal(parts: list[dict[str, Any]], one: dict[str, Any]) -> None:
    """Rows of both processes are those of one, in order."""
    for key in ("stream_id", "chunk_index"):
        assert [value for part in parts for value in part[key]] == one[key]
    assert one["slots"]
    for slot, fields in one["slots"].items():
        for field, rows in fields.items():
            both = torch.cat([part["slots"][slot][field] for part in parts])
            torch.testing.assert_close(both, rows, **CLOSE)
