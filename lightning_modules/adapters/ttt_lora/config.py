"""Options of TTT-LoRA as peft keeps them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from peft import PeftConfig

from lightning_modules.adapters.ttt_lora.peft_type import peft_type
from lightning_modules.layers.ttt_lora import TTTLoRAOptions


@dataclass
class TTTLoraConfig(PeftConfig):
    """Where TTT-LoRA goes, how large it is, and how it learns.

    Args:
        inner_dim: d, the size of the map in the middle; None takes it from `match_rank`.
        match_rank: as many parameters as a LoRA of this rank has, at most.
        match_per: matched in every `linear` layer by itself, or with one size for the siblings of
            a `parent` that read the same input (q, k, v; gate, up), which then learn together.
        target_modules: names of linear layers (their last parts), a regular expression, or
            `all-linear`; None: all of attention and MLPs in known architectures.
        exclude_modules: names or a regular expression of what is left out.
        layers_to_transform: indices of the layers that get adapters; None: all.
        layers_pattern: name of the list of layers, if it is not a usual one.
        inner_dim_pattern: name or regular expression of layers -> their `inner_dim`.
        group_siblings: compute siblings of one size together.
        base_fingerprint: of the weights that the adapter belongs to; None takes that of the model
            that it is put into, and an adapter's file is refused by other weights.
        mini_batch_size: this and what follows: see `TTTLoRAOptions`.
    """

    inner_dim: int | None = None
    match_rank: int = 16
    match_per: Literal["linear", "parent"] = "parent"
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    inner_dim_pattern: dict[str, int] = field(default_factory=dict)
    group_siblings: bool = True
    base_fingerprint: str | None = None
    mini_batch_size: int = 8
    mode: Literal["A", "B"] = "A"
    loss: Literal["plain", "ln"] = "plain"
    lr_gate_init: float = -2.0
    rate_per_token: bool = False
    output_norm: bool = True
    q_residual: bool = False
    scaling: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list | tuple):
                setattr(self, name, set(getattr(self, name)))
        if self.match_per not in ("linear", "parent"):
            raise ValueError(f"match_per={self.match_per!r} must be linear or parent")
        if self.inner_dim is not None and self.inner_dim < 1:
            raise ValueError(f"inner_dim={self.inner_dim} must be at least 1, or None to match")
        small = {name: size for name, size in self.inner_dim_pattern.items() if size < 1}
        if small:
            raise ValueError(f"inner_dim_pattern={small} must be at least 1")
        if self.match_rank < 1:
            raise ValueError(f"match_rank={self.match_rank} must be at least 1")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern is of layers_to_transform: give both")
        self.options()

    def options(self) -> TTTLoRAOptions:
        """How the adapters learn."""
        names = [f.name for f in fields(TTTLoRAOptions)]
        values: dict[str, Any] = {name: getattr(self, name) for name in names}
        return TTTLoRAOptions(**values)
