"""Inputs and calls of the LaCT op; comparing and differentiating them is in `ttt_cases`."""

from typing import Any

import torch
from stream_cases import StreamCase, random_flags, run_in_pieces
from torch import Tensor

from lightning_modules.ops.lact import lact
from lightning_modules.ops.states import LaCTState

__all__ = ["BACKENDS", "Case", "carried_state", "make_case", "random_flags", "run_in_pieces"]

BACKENDS = ("naive", "torch")
TOKENS = ("q", "k", "v", "lr", "momentum")
WEIGHTS = ("w0", "w1", "w2")
INPUTS = (*TOKENS[:4], *WEIGHTS)
FLAGS = ("mask", "document_ids")


class Case(StreamCase):
    """A call of the LaCT op."""

    TOKENS = TOKENS

    def run(self, backend: str, **options: Any) -> tuple[Tensor, LaCTState]:
        """Call the op; `options` override those of the case."""
        keywords = {"state": self.state, "momentum": self.tensors.get("momentum"), **self.options}
        return lact(
            *(self.tensors[name] for name in INPUTS), **{**keywords, **options}, backend=backend
        )

    def heads(self, index: slice) -> "Case":
        """The call with only some of the heads, from a fresh state."""
        per_token = {n: self.tensors[n][:, :, index] for n in TOKENS if n in self.tensors}
        return self.with_tensors(**per_token, **{n: self.tensors[n][:, index] for n in WEIGHTS})


def make_case(
    *,
    time: int,
    chunk_size: int,
    batch: int = 2,
    heads: int = 2,
    size: int = 4,
    hidden: int = 6,
    blocks: int = 1,
    momentum: bool = True,
    per_channel: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Case:
    """Random inputs, with rates at which a chunk changes the weights by about their own size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    lead = (batch, time, heads)
    tensors = {name: normal(*lead, size) for name in ("q", "k", "v")}
    for name in ("q", "k"):
        tensors[name] /= tensors[name].norm(dim=-1, keepdim=True)
    tensors["lr"] = 0.1 + uniform(*lead, 3, *([size] if per_channel else []))
    if momentum:
        tensors["momentum"] = 0.2 + 0.7 * uniform(*lead)
    tensors["w0"] = normal(blocks, heads, hidden, size) / size**0.5
    tensors["w1"] = normal(blocks, heads, size, hidden) / hidden**0.5
    tensors["w2"] = normal(blocks, heads, hidden, size) / size**0.5
    options["chunk_size"] = chunk_size
    return Case({name: x.to(dtype) for name, x in tensors.items()}, options)


def carried_state(case: Case, seed: int, time: int = 7) -> Case:
    """Start the call from the state after other random tokens, a different number in each row."""
    batch, _, heads, size = case.tensors["q"].shape
    other = make_case(
        time=time,
        chunk_size=case.options["chunk_size"],
        batch=batch,
        heads=heads,
        size=size,
        momentum="momentum" in case.tensors,
        per_channel=case.tensors["lr"].dim() == 5,
        seed=seed + 1,
        dtype=case.tensors["q"].dtype,
    )
    earlier = {name: other.tensors[name] for name in TOKENS if name in other.tensors}
    mask = torch.arange(time)[None] >= torch.arange(batch)[:, None]
    before = case.with_tensors(**earlier).with_options(mask=mask)
    if "document_ids" in case.options:
        first = case.options["document_ids"][:, :1]
        before = before.with_options(document_ids=first.expand(batch, time))
    return case.with_state(before.run("naive")[1])
