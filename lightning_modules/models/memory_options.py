"""Which layers of a decoder have a memory, and which of them share a bank."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lightning_modules.layers.memory_branch import MemoryConfig


@dataclass(frozen=True)
class MemoryOptions:
    """Which layers of a decoder get a memory, and which of them share a bank.

    Args:
        placement: `all` layers, the `first_k` or `last_k`, `every_n` (the last of every n layers),
            `custom` (listed in `layers`), or `none`.
        count: the k or n of the placement.
        layers: the layers of `custom`, counted from 0.
        sharing: `shared`: one bank for all; `per_layer`: one each; `every_k_layers`: one for every
            `sharing_k` of the layers with memory.
        sharing_k: how many layers share a bank in `every_k_layers`.
        memory: bank, reader and router.
    """

    placement: Literal["all", "first_k", "last_k", "every_n", "custom", "none"] = "all"
    count: int | None = None
    layers: tuple[int, ...] | None = None
    sharing: Literal["shared", "per_layer", "every_k_layers"] = "shared"
    sharing_k: int | None = None
    memory: MemoryConfig = field(default_factory=MemoryConfig)

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        counted = self.placement in ("first_k", "last_k", "every_n")
        if counted != (self.count is not None) or (self.count is not None and self.count < 1):
            raise ValueError(
                f"memory.placement={self.placement} with count={self.count}: first_k, last_k and "
                "every_n need a count of at least 1, the others have none"
            )
        if (self.placement == "custom") != (self.layers is not None):
            raise ValueError(
                f"memory.placement={self.placement} with layers={self.layers}: custom needs a list "
                "of layers, the others have none"
            )
        if (self.sharing == "every_k_layers") != (self.sharing_k is not None):
            raise ValueError(
                f"memory.sharing={self.sharing} with sharing_k={self.sharing_k}: every_k_layers "
                "needs sharing_k, the others have none"
            )
        if self.sharing_k is not None and self.sharing_k < 1:
            raise ValueError(f"memory.sharing_k={self.sharing_k} must be at least 1")

    def bank_of(self, places: int) -> list[int]:
        """Number of the bank of each of so many layers with memory."""
        share = {"shared": places, "per_layer": 1, "every_k_layers": self.sharing_k or 1}
        return [place // share[self.sharing] for place in range(places)]

    def places(self, num_layers: int) -> list[int]:
        """Numbers of the layers with memory, of a decoder with so many layers.

        Raises:
            ValueError: it has no such layer.
        """
        everything = list(range(num_layers))
        if self.placement in ("all", "none"):
            return everything if self.placement == "all" else []
        if self.placement == "custom":
            assert self.layers is not None
            wrong = [layer for layer in self.layers if layer not in everything]
            if wrong or len(set(self.layers)) < len(self.layers):
                raise ValueError(
                    f"memory.layers={list(self.layers)}: choose different layers from 0 to "
                    f"{num_layers - 1}" + (f", not {wrong[0]}" if wrong else "")
                )
            return sorted(self.layers)
        assert self.count is not None
        if self.count > num_layers:
            raise ValueError(
                f"memory.count={self.count} of placement {self.placement}, but the model has "
                f"{num_layers} layers"
            )
        if self.placement == "every_n":
            return everything[self.count - 1 :: self.count]
        return (
            everything[: self.count] if self.placement == "first_k" else everything[-self.count :]
        )
