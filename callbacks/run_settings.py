"""The options of a run as flat names and plain values, named as on the command line."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import SaveConfigCallback

Value = bool | int | float | str

TRAINER = ("max_steps", "gradient_clip_val", "precision", "accumulate_grad_batches")
"""Options of the trainer that change what is learned."""


def settings(trainer: pl.Trainer, pl_module: Any) -> dict[str, Value]:
    """`model.fast_state`, `data.batch_size`, `trainer.precision`, `lr.base`, ...: what was chosen.

    Options come from the command line's config, or without one from the attributes that have the
    names of the constructors' arguments. What is None was not chosen.
    """
    found = _from_command_line(trainer)
    if not found:
        found = {"model": _arguments(pl_module), "trainer": _of_trainer(trainer)}
        if trainer.datamodule is not None:  # type: ignore[attr-defined]
            found["data"] = _arguments(trainer.datamodule)  # type: ignore[attr-defined]
    names = {type(callback).__name__ for callback in trainer.callbacks}  # type: ignore[attr-defined]
    watched = {"trainer.callbacks": ", ".join(sorted(names))}
    flat = {
        name: value for name, value in _flatten(found) if not _is_flag_of_optimizer(name, value)
    }
    return flat | watched | _learning_rates(trainer)


def _is_flag_of_optimizer(name: str, value: Value) -> bool:
    """`amsgrad`, `capturable` and the like, which would only fill the table."""
    return name.startswith("model.optimizer.") and isinstance(value, bool)


def _from_command_line(trainer: pl.Trainer) -> dict[str, Any]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SaveConfigCallback):
            config = callback.config.as_dict()
            options = config.get("trainer") or {}
            chosen = {name: options[name] for name in TRAINER if name in options}
            kept = {name: config.get(name) for name in ("seed_everything", "model", "data")}
            return {**kept, "trainer": chosen}
    return {}


def _of_trainer(trainer: Any) -> dict[str, Any]:
    return {name: getattr(trainer, name) for name in TRAINER}


def _arguments(made: Any) -> dict[str, Any]:
    """Values of the constructor's arguments, as far as they were kept under their names."""
    constructors = [
        vars(parent)["__init__"] for parent in type(made).__mro__ if "__init__" in vars(parent)
    ]
    names = [name for made_by in constructors for name in inspect.signature(made_by).parameters]
    options = {name: vars(made)[name] for name in names if name in vars(made)}
    return {"class_path": type(made).__name__, **options}


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, Value]]:
    """Leaves with dotted names; `init_args`, which the command line may omit, is left out."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        for key, item in value.items():
            place = name if key == "init_args" else f"{name}.{key}" if name else str(key)
            yield from _flatten(item, place)
    elif isinstance(value, bool | int | float | str):
        is_class = name.endswith(".class_path")
        yield name.removesuffix(".class_path"), str(value).rsplit(".", 1)[-1] if is_class else value
    elif isinstance(value, list | tuple):
        yield name, str(list(value))


def _learning_rates(trainer: pl.Trainer) -> dict[str, Value]:
    """The largest learning rate of each parameter group."""
    return {
        f"lr.{group['name'].split('/')[0]}": float(group.get("initial_lr", group["lr"]))
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
        if "name" in group
    }
