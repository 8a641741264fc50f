"""Inputs and calls of the In-Place op; comparing and differentiating them is in `ttt_cases`."""

from typing import Any

import torch
from stream_cases import StreamCase, random_flags, run_in_pieces
from torch import Tensor

from lightning_modules.ops import InPlaceState, in_place

__all__ = [
    "BACKENDS",
    "FLAGS",
    "FORMS",
    "INPUTS",
    "TOKENS",
    "Case",
    "carried_state",
    "make_case",
    "random_flags",
    "run_in_pieces",
]

BACKENDS = ("naive", "torch")
TOKENS = ("z", "v", "eta")
INPUTS = ("z", "v", "w_down", "eta")
FLAGS = ("mask", "document_ids")
FORMS: dict[str, dict[str, Any]] = {
    "history": {"hidden": 64, "size": 48},
    "chunks": {"hidden": 7, "size": 5},
    "clipped_history": {"hidden": 64, "size": 48, "clip": 19.0},
    "clipped_chunks": {"hidden": 7, "size": 5, "clip": 2.0},
}
"""Sizes at which the torch backend takes the one or the other form, chunks of 2 or 3 tokens given;
the clips are near the median of the norms."""


class Case(StreamCase):
    """A call of the In-Place op."""

    TOKENS = TOKENS

    def run(self, backend: str, **options: Any) -> tuple[Tensor, InPlaceState]:
        """Call the op; `options` override those of the case."""
        keywords = {"state": self.state, **self.options, **options, "backend": backend}
        return in_place(*(self.tensors[name] for name in INPUTS), **keywords)


def make_case(
    *,
    time: int,
    chunk_size: int,
    batch: int = 2,
    hidden: int = 7,
    size: int = 5,
    per_token: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Case:
    """Random inputs; eta is one number for all tokens, or one for each."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = {
        "z": normal(batch, time, hidden),
        "v": normal(batch, time, size),
        "w_down": normal(size, hidden),
        "eta": 0.2 + 0.1 * normal(*([batch, time] if per_token else [])),
    }
    options["chunk_size"] = chunk_size
    return Case({name: x.to(dtype) for name, x in tensors.items()}, options)


def carried_state(case: Case, seed: int, time: int = 7) -> Case:
    """Start the call from the state after other random tokens, a different number in each row."""
    batch, _, hidden = case.tensors["z"].shape
    other = make_case(
        time=time,
        chunk_size=case.options["chunk_size"],
        batch=batch,
        hidden=hidden,
        size=case.tensors["v"].shape[-1],
        seed=seed + 1,
        dtype=case.tensors["z"].dtype,
    )
    mask = torch.arange(time)[None] >= torch.arange(batch)[:, None]
    earlier = {name: other.tensors[name] for name in TOKENS}
    before = case.with_tensors(**earlier).with_options(mask=mask)
    if "document_ids" in case.options:
        first = case.options["document_ids"][:, :1]
        before = before.with_options(document_ids=first.expand(batch, time))
    return case.with_state(before.run("naive")[1])
