"""Inputs, calls and gradients of chapter attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_modules.ops import chapter_attention

BACKENDS = ("naive", "torch")
NAMES = ("q", "mem_k", "mem_v")
PATHS: dict[str, dict[str, Any]] = {
    "sorted": {"time": 37, "rows": 3},
    "sorted_blocks": {"time": 23, "block_size": 2},
    "few_small_blocks": {"time": 7, "block_size": 5},
    "blocks": {"time": 70, "block_size": 32, "rows": 5},
    "one_block": {"time": 21, "block_size": 32},
    "one_short_block": {"time": 3, "block_size": 32},
    "decoding": {"time": 1},
    "decoding_several": {"time": 3, "num_chapters": 20},
}
"""Sizes for the ways through the torch backend: `sorted*` are read in sorted tiles."""


@dataclass(frozen=True)
class Case:
    """Arguments of one call: `tensors` are differentiable, `options` are the other keywords."""

    tensors: dict[str, Tensor]
    chapters: Tensor | None
    options: dict[str, Any]

    def run(self, backend: str, **options: Any) -> Any:
        """Call the op; `options` override those of the case."""
        return chapter_attention(
            *(self.tensors[name] for name in NAMES),
            self.chapters,
            self.tensors.get("log_weights"),
            **{**self.options, **options},
            backend=backend,
        )

    def outputs(self, backend: str, **options: Any) -> dict[str, Tensor]:
        """`o`, and `lse` where there is one."""
        if {**self.options, **options}.get("mixing") == "mixture":
            return {"o": self.run(backend, **options)}
        return dict(zip(("o", "lse"), self.run(backend, return_lse=True, **options), strict=True))

    def with_tensors(self, **tensors: Tensor) -> Case:
        """The same call with other tensors."""
        return replace(self, tensors={**self.tensors, **tensors})

    def with_options(self, **options: Any) -> Case:
        """The same call with other keywords."""
        return replace(self, options={**self.options, **options})

    def choices(self, index: Any) -> Case:
        """The same call with only some of the chosen chapters, or in another order."""
        assert self.chapters is not None
        weights = self.tensors["log_weights"][..., index]
        return replace(self.with_tensors(log_weights=weights), chapters=self.chapters[..., index])

    def rows(self, index: slice) -> Case:
        """The call with only some rows of the batch."""
        cut = {name: self.tensors[name][index] for name in ("q", "log_weights")}
        assert self.chapters is not None
        return replace(self.with_tensors(**cut), chapters=self.chapters[index])

    def on(self, device: str) -> Case:
        """The call with everything on another device."""
        assert self.chapters is not None
        moved = self.with_tensors(**{name: x.to(device) for name, x in self.tensors.items()})
        return replace(moved, chapters=self.chapters.to(device))

    def to(self, dtype: torch.dtype) -> Case:
        """The call in another dtype."""
        return self.with_tensors(**{name: x.to(dtype) for name, x in self.tensors.items()})


def make_case(
    *,
    time: int,
    top_k: int,
    num_chapters: int = 6,
    rows: int = 3,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    size: int = 5,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Case:
    """Random inputs; chapters are any `top_k` different ones of those not shared."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    shared = options.get("shared", 0)
    blocks = -(-time // options.get("block_size", 1))
    order = torch.rand(batch, blocks, num_chapters - shared, generator=generator)
    tensors = {
        "q": normal(batch, time, heads, size),
        "mem_k": normal(num_chapters, rows, kv_heads, size),
        "mem_v": normal(num_chapters, rows, kv_heads, size),
        "log_weights": normal(batch, blocks, top_k),
    }
    return Case(tensors, order.topk(top_k).indices + shared, options)


def differentiate(
    case: Case, run: Callable[[Case], dict[str, Tensor]], seed: int = 1
) -> dict[str, Tensor]:
    """Outputs, and every gradient of their product with a random cotangent."""
    generator = torch.Generator().manual_seed(seed)
    leaves = {name: x.detach().clone().requires_grad_() for name, x in case.tensors.items()}
    outputs = run(case.with_tensors(**leaves))
    loss = sum(
        (x.double() * torch.randn(x.shape, generator=generator).to(x.device)).sum()
        for x in outputs.values()
    )
    assert isinstance(loss, Tensor)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"grad/{name}": x for name, x in zip(leaves, gradients, strict=True)}
    return {name: x.detach() for name, x in {**outputs, **named}.items()}


def relative_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference in any tensor, by the largest number in it (at least 1e-3)."""
    assert actual.keys() == expected.keys()
    return max(
        (actual[name].double() - x.double()).abs().max().item()
        / max(x.double().abs().max().item(), 1e-3)
        for name, x in expected.items()
    )


class SizeSpy(TorchDispatchMode):
    """Records the number of elements of every tensor that an operation makes (views included)."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor) and not func.is_view:
                self.sizes.append((func._schema.name, x.numel()))
        return out

    @property
    def largest(self) -> tuple[str, int]:
        """Name and elements of the largest."""
        return max(self.sizes, key=lambda size: size[1])
