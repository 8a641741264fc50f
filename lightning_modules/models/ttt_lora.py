"""Adapters of a pretrained language model: TTT-LoRA, In-Place TTT, LoRA, and their parameters."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

from torch import nn

from lightning_modules.layers.ttt_lora import FAST, RATE, TTTLoRAOptions
from lightning_modules.models.in_place import InPlaceOptions, inject_in_place
from lightning_modules.models.peft_files import put_beside
from lightning_modules.models.projection_lora import ProjectionLoRA, inject_lora

CELLS = "ttt_lora_cells"
TTT_LORA = "ttt_lora"
"""Name of the adapter in peft's terms; that of LoRA is `default`."""
Method = Literal["none", "lora", "ttt_lora", "in_place", "ttt_lora+lora"]
METHODS = ("none", "lora", "ttt_lora", "in_place", "ttt_lora+lora")
GROUPS = ("base", "theta", "fast", "gate", "in_place", "lora")


@dataclass(frozen=True)
class TTTLoRAPlacement:
    """Where TTT-LoRA goes, how large it is, and how it learns.

    Args:
        inner_dim: d, the size of the map in the middle; None takes it from `match_rank`.
        match_rank: as many parameters as a LoRA of this rank has, at most.
        match_per: matched in every `linear` layer by itself, or with one size for the siblings of
            a `parent` that read the same input (q, k, v; gate, up), which then learn together.
        targets: names of linear layers (their last parts) or a regular expression; None: all of
            attention and MLPs in known architectures.
        layers: indices of the layers that get adapters; None: all.
        group_siblings: compute siblings of one size together.
        learner: how it learns.
    """

    inner_dim: int | None = None
    match_rank: int = 16
    match_per: Literal["linear", "parent"] = "parent"
    targets: list[str] | str | None = None
    layers: list[int] | None = None
    group_siblings: bool = True
    learner: TTTLoRAOptions = field(default_factory=TTTLoRAOptions)


def inject_ttt_lora(model: nn.Module, placement: TTTLoRAPlacement) -> None:
    """Put TTT-LoRA into a model, in place, as the adapter `ttt_lora`; peft freezes the rest."""
    from lightning_modules.adapters.ttt_lora import TTTLoraConfig  # slow: imports peft

    config = TTTLoraConfig(
        inner_dim=placement.inner_dim,
        match_rank=placement.match_rank,
        match_per=placement.match_per,
        target_modules=placement.targets,
        layers_to_transform=placement.layers,
        group_siblings=placement.group_siblings,
        **asdict(placement.learner),
    )
    put_beside(model, config, TTT_LORA)


def inject_method(
    model: nn.Module,
    method: Method,
    ttt_lora: TTTLoRAPlacement,
    in_place: InPlaceOptions,
    lora: ProjectionLoRA,
) -> None:
    """Put the adapters of a method into a model, in place. It computes what it did.

    Raises:
        ValueError: they do not fit the model; the message names what does not.
    """
    if method == "in_place":
        inject_in_place(model, in_place)
    if method.startswith("ttt_lora"):
        inject_ttt_lora(model, ttt_lora)
    if method.endswith("+lora") or method == "lora":
        inject_lora(model, lora)


def parameter_group(name: str) -> str:
    """Group of a parameter by its dotted name: one of `GROUPS`.

    `theta` are projections and norms of TTT-LoRA, `fast` its learned initial fast weights, `gate`
    its step sizes.
    """
    parts = name.split(".")
    if CELLS in parts:
        inner = {*parts[parts.index(CELLS) :]}
        return "fast" if inner & FAST else "gate" if inner & RATE else "theta"
    if any(part.startswith("lora_") for part in parts):
        return "lora"
    return "in_place" if "ttt" in parts else "base"
