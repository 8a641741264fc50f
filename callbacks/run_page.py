"""The page that says what a run is: sizes by parameter group, fast state, data, base."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl

from callbacks.run_settings import Value
from callbacks.tags import facts
from callbacks.throughput import count
from lightning_modules.streams import Slots, StreamPlan

MAX_OPTIONS = 60
"""Options of the model that the page lists."""


class StepSize(NamedTuple):
    """What a step of one process reads.

    Attributes:
        rows: of a chunk.
        chunks: of the step.
        tokens: input tokens or action steps of rows that have a file.
    """

    rows: int
    chunks: int
    tokens: int

    @classmethod
    def of(cls, batch: Any, plans: Sequence[StreamPlan]) -> StepSize:
        """Of a batch, a list of chunks, and what the host knows of them; nothing waits."""
        tokens = sum(count(*pair)[1] for pair in zip(batch, plans, strict=True))
        return cls(len(plans[0].stream_id), len(plans), tokens)


def run_page(
    trainer: pl.Trainer, pl_module: Any, step: StepSize, options: Mapping[str, Value]
) -> str:
    """Markdown tables about a run whose first step is behind it.

    Args:
        trainer: of the run.
        pl_module: an `AdapterModule`.
        step: what its first step read.
        options: as `run_settings.settings` gives them.
    """
    tables = {
        "What is trained": facts(_what(pl_module, options)),
        "Parameters": _parameters(pl_module),
        "Fast state": _fast_state(pl_module),
        "Data": facts(_data(trainer, pl_module, step)),
        "Options": facts(_options(options)),
    }
    return "\n\n".join(f"### {title}\n\n{table}" for title, table in tables.items())


def _what(pl_module: Any, options: Mapping[str, Value]) -> dict[str, str]:
    base = next(
        (f"{value} ({name})" for name, value in options.items() if _names_base(name)),
        "none: trained from scratch",
    )
    rows = {"variant": type(pl_module).__name__, "base model": base}
    for name in ("method", "arm", "backbone", "ttt_state", "fast_state"):
        if f"model.{name}" in options:
            rows[name] = str(options[f"model.{name}"])
    return rows


def _names_base(name: str) -> bool:
    return name in ("model.pretrained.name", "model.pi0.pretrained")


def _parameters(pl_module: Any) -> str:
    """Parameters by group; frozen ones count as not trained."""
    group_of = getattr(pl_module, "parameter_group", lambda name: "all")
    total: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    for name, parameter in pl_module.named_parameters():
        total[group_of(name)] += parameter.numel()
        trained[group_of(name)] += parameter.numel() * parameter.requires_grad
    lines = ["| group | parameters | trained |", "|---|---:|---:|"]
    lines += [f"| {name} | {total[name]:,} | {trained[name]:,} |" for name in sorted(total)]
    everything, learning = sum(total.values()), sum(trained.values())
    share = learning / max(1, everything)
    lines.append(f"| **all** | **{everything:,}** | **{learning:,} ({share:.1%})** |")
    return "\n".join(lines)


def _fast_state(pl_module: Any) -> str:
    slots = pl_module.streams.slots("train")
    if not slots:
        return "Nothing is carried from chunk to chunk."
    kinds = state_sizes(slots)
    lines = ["| layers | how many | bytes per stream |", "|---|---:|---:|"]
    lines += [f"| `{kind}` | {n} | {size:,} |" for kind, (n, size) in kinds.items()]
    everything = sum(size for _, size in kinds.values())
    lines.append(f"| **all** | **{sum(n for n, _ in kinds.values())}** | **{everything:,}** |")
    return "\n".join(lines)


def state_sizes(slots: Slots) -> dict[str, tuple[int, int]]:
    """Kind of layer (its path without numbers) -> how many there are, and bytes of one row of all.

    Known from shapes: nothing waits for the device.
    """
    kinds: dict[str, tuple[int, int]] = {}
    for slot, fields in slots.items():
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", slot)
        size = sum(
            value.element_size() * value[:1].numel() for value in fields.values() if value.numel()
        )
        number, bytes_ = kinds.get(kind, (0, 0))
        kinds[kind] = (number + 1, bytes_ + size)
    return kinds


def _data(trainer: Any, pl_module: Any, step: StepSize) -> dict[str, str]:
    datamodule = trainer.datamodule
    rows = {
        "data module": "none" if datamodule is None else type(datamodule).__name__,
        "rows per process (batch_size)": str(step.rows),
        "chunks per step (tbptt)": str(step.chunks),
        "tokens or action steps per step and process": f"{step.tokens:,}",
        "processes": str(trainer.world_size),
    }
    for name in ("chunk_length", "mode", "horizon", "stride"):
        if (value := getattr(pl_module, "features", {}).get(name)) is not None:
            rows[name] = str(value)
    flops = getattr(pl_module, "flops_per_batch", None)
    if flops and step.tokens:
        rows["FLOPs per token (forward and backward)"] = f"{flops / step.tokens:,.0f}"
    return rows


def _options(options: Mapping[str, Value]) -> dict[str, str]:
    shown = dict(list(options.items())[:MAX_OPTIONS])
    left = len(options) - len(shown)
    rows = {f"`{name}`": str(value) for name, value in shown.items()}
    return rows | ({"...": f"{left} more in config.yaml and in the HPARAMS tab"} if left else {})
