"""AdapterModule: what the LightningModules of all variants share.

Optimizer groups with their own learning rate and decay, warmup and decay of the learning rate,
and the loop over the chunks of a batch, in which fast state travels from chunk to chunk.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lightning_modules.distributed.loss import over_processes
from lightning_modules.distributed.processes import prepare, seed_process
from lightning_modules.means import TargetMean
from lightning_modules.streams import NO_STREAM, FastState, StreamPlan, StreamState
from lightning_modules.tuning import TunableStreams

Chunk = dict[str, Any]


@dataclass(frozen=True)
class ParameterGroup:
    """How one group of parameters is trained.

    Args:
        lr_scale: multiple of the optimizer's learning rate.
        weight_decay: decay of matrices; None takes the optimizer's. Norms and biases
            never decay.
        frozen: True trains none of the group.
    """

    lr_scale: float = 1.0
    weight_decay: float | None = None
    frozen: bool = False

    def __post_init__(self) -> None:
        if self.lr_scale <= 0:
            raise ValueError(f"lr_scale={self.lr_scale} must be positive; freeze with frozen=true")


@dataclass(frozen=True)
class Schedule:
    """Learning rate over the run, updated every step.

    Args:
        warmup_steps: optimizer steps of linear growth from 0.
        decay: `cosine` goes down to `final_scale` at the last step, `constant` stays.
        final_scale: multiple of the learning rate at the end of `cosine`.
    """

    warmup_steps: int = 0
    decay: Literal["cosine", "constant"] = "cosine"
    final_scale: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or self.final_scale < 0:
            raise ValueError(
                f"schedule: warmup_steps={self.warmup_steps} and final_scale={self.final_scale} "
                "must be at least 0"
            )

    def scale(self, step: int, total_steps: int) -> float:
        """Multiple of the learning rate at an optimizer step, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.decay == "constant":
            return 1.0
        progress = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.final_scale + (1 - self.final_scale) * cosine


class AdapterModule(TunableStreams):
    """Base of the variants: a subclass gives `chunk_loss` and names its parameter groups.

    Args:
        optimizer: class and options, e.g. `{class_path: torch.optim.AdamW, init_args: {lr: 1e-3}}`.
        schedule: learning rate over the run.
        groups: training options by group name (see `parameter_group`); others train plainly.
        persistent: whether fast state is carried from chunk to chunk of a file.
    """

    GROUPS: tuple[str, ...] = ("base", "adapter", "gate", "fast")

    def __init__(
        self,
        optimizer: OptimizerCallable,
        schedule: Schedule | None = None,
        groups: dict[str, ParameterGroup] | None = None,
        *,
        persistent: bool,
    ) -> None:
        super().__init__()
        unknown = set(groups or {}) - set(self.GROUPS)
        if unknown:
            raise ValueError(
                f"unknown parameter group {sorted(unknown)[0]!r}; the groups are "
                f"{', '.join(self.GROUPS)}"
            )
        self.optimizer_factory = optimizer
        self.schedule = schedule or Schedule()
        self.groups = dict(groups or {})
        self.streams = StreamState(persistent=persistent)
        self.means = nn.ModuleDict({f"{stage}_loss": TargetMean() for stage in ("val", "test")})

    @abstractmethod
    def chunk_loss(
        self, chunk: Chunk, fast_state: FastState, generator: torch.Generator | None
    ) -> Tensor:
        """Mean loss of one chunk, a scalar.

        Args:
            chunk: batch-contract dict.
            fast_state: handle on the chunk's state, to be handed down to the model.
            generator: source of noise; None uses the global one.
        """

    def chunk_targets(self, chunk: Chunk) -> Tensor:
        """Over how many targets `chunk_loss` is the mean, a scalar: by default over live rows."""
        ids = StreamPlan.of(chunk).stream_id
        return torch.full((), sum(id_ != NO_STREAM for id_ in ids), device=self.device)

    def predict_chunk(
        self, chunk: Chunk, fast_state: FastState, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """What `predict` writes of one chunk, name -> `[B, ...]`; arguments as `chunk_loss`."""
        raise NotImplementedError(
            f"{type(self).__name__} has no predict_chunk, so there is nothing to predict: "
            "implement it, or use validate or test"
        )

    def parameter_group(self, name: str) -> str:
        """Group of a parameter (one of `GROUPS`) by its dotted name."""
        return "base"

    def left_out_names(self) -> set[str]:
        """Names of weights that checkpoints leave out, because building the model loads them."""
        return set()

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay applies: to matrices, but to no norm and no bias."""
        return parameter.dim() > 1 and not re.search(r"norm|bias|\.b[12]$", name)

    def setup(self, stage: str) -> None:
        """Prepare the processes, when they have met."""
        prepare(self.trainer)

    def on_fit_start(self) -> None:
        """Let every process draw noise of its own."""
        seed_process(self.global_rank)

    def training_step(self, batch: list[Chunk], batch_idx: int) -> Tensor:
        """Sum of the losses of the batch's chunks; one backward goes through all of them.

        A loss is the mean over the targets of all processes (see `over_processes`). Auxiliary
        losses that layers left in a chunk's `FastState` are added, and logged by name.
        """
        losses, auxiliary = [], defaultdict(list)
        for chunk in batch:
            handle = self.streams.begin(chunk)
            losses.append(self.chunk_loss(chunk, handle, None))
            for name, value in _named_losses(handle):
                auxiliary[name].append(value)
        loss, mean = over_processes(
            torch.stack(losses), lambda: torch.stack([self.chunk_targets(c) for c in batch])
        )
        self.log("train/loss", mean, batch_size=_rows(batch))
        total = loss.sum()
        for name, values in auxiliary.items():
            value = torch.stack(values).sum()
            self.log(f"train/{name}", value.detach() / len(batch), batch_size=_rows(batch))
            total = total + value
        return total

    def validation_step(self, batch: list[Chunk], batch_idx: int) -> None:
        """Mean loss over all targets, with noise that is the same in every validation run."""
        self._evaluation_step("val", batch, batch_idx)

    def test_step(self, batch: list[Chunk], batch_idx: int) -> None:
        """Mean loss over all targets, with noise that is the same in every test run."""
        self._evaluation_step("test", batch, batch_idx)

    def _evaluation_step(self, name: str, batch: list[Chunk], batch_idx: int) -> None:
        # A generator of its own: evaluation must not move the one that training draws from.
        generator = torch.Generator(self.device).manual_seed(batch_idx)
        metric = self.means[f"{name}_loss"]
        for chunk in batch:
            targets = self.chunk_targets(chunk)
            metric.update(
                self.chunk_loss(chunk, self.streams.begin(chunk), generator) * targets, targets
            )
        self.log(f"{name}/loss", metric, on_step=False, on_epoch=True)

    def predict_step(self, batch: list[Chunk], batch_idx: int) -> dict[str, Tensor]:
        """Predictions of the batch's chunks, one after the other, without its idle rows.

        The noise is the same in every run.

        Returns:
            name -> `[N, ...]`, where N counts the live rows of all chunks.
        """
        generator = torch.Generator(self.device).manual_seed(batch_idx)
        parts = []
        for chunk in batch:
            prediction = self.predict_chunk(chunk, self.streams.begin(chunk), generator)
            ids = StreamPlan.of(chunk).stream_id
            live = torch.tensor([id_ != NO_STREAM for id_ in ids], device=self.device)
            parts.append({name: values[live] for name, values in prediction.items()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def configure_optimizers(self) -> Any:
        """Optimizer over the groups of trainable parameters, and its schedule."""
        optimizer = self.optimizer_factory(self._optimizer_groups())
        for group in optimizer.param_groups:
            group["lr"] *= group.pop("lr_scale")
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.schedule.scale(step, total)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"},
        }

    def _optimizer_groups(self) -> list[dict[str, Any]]:
        members: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            group = self.parameter_group(name)
            if self.groups.get(group, ParameterGroup()).frozen:
                parameter.requires_grad_(False)
            if parameter.requires_grad:
                members.setdefault((group, self.decays(name, parameter)), []).append(parameter)
        if not members:
            raise ValueError(
                "no parameter is left to train: every group is frozen, or nothing was added to a "
                "frozen model (then use validate or test)"
            )
        return [self._optimizer_group(*key, members[key]) for key in sorted(members)]

    def _optimizer_group(
        self, name: str, decays: bool, parameters: list[nn.Parameter]
    ) -> dict[str, Any]:
        options = self.groups.get(name, ParameterGroup())
        group: dict[str, Any] = {
            "params": parameters,
            "name": name if decays else f"{name}/no_decay",
            "lr_scale": options.lr_scale,
        }
        if not decays:
            group["weight_decay"] = 0.0
        elif options.weight_decay is not None:
            group["weight_decay"] = options.weight_decay
        return group


def refuse_to_train(parameters: Any) -> NoReturn:
    """The optimizer of a module that was rebuilt from a checkpoint for inference."""
    raise RuntimeError(
        "a module that was rebuilt from a checkpoint has no optimizer: to train on, run "
        "python cli.py fit --ckpt_path, or make the module with one"
    )


def _named_losses(handle: FastState) -> Iterator[tuple[str, Tensor]]:
    """Auxiliary losses of all layers, one after the other, with their names."""
    for losses in handle.losses.values():
        yield from losses.items()


def _rows(batch: list[Chunk]) -> int:
    return len(batch[0]["stream_id"])
