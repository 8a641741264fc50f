"""Inputs and calls of the In-Place op; comparing and differentiating them is in `ttt_cases`."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_modules.ops import InPlaceState, in_place

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


@dataclass(frozen=True)
class Case:
    """Arguments of one call: `tensors` are differentiable, `options` are the other keywords."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    state: InPlaceState | None = None

    def run(self, backend: str, **options: Any) -> tuple[Tensor, InPlaceState]:
        """Call the op; `options` override those of the case."""
        keywords = {"state": self.state, **self.options, **options, "backend": backend}
        return in_place(*(self.tensors[name] for name in INPUTS), **keywords)

    def with_tensors(self, **tensors: Tensor) -> "Case":
        """The same call with other tensors."""
        return replace(self, tensors={**self.tensors, **tensors})

    def with_options(self, **options: Any) -> "Case":
        """The same call with other keywords."""
        return replace(self, options={**self.options, **options})

    def with_state(self, state: InPlaceState | None) -> "Case":
        """The same call from another state."""
        return replace(self, state=state)

    def tokens(self, index: Any) -> "Case":
        """The call with only some of the tokens (any index of the time axis)."""
        return self._cut(lambda x: x[:, index])

    def rows(self, index: Any) -> "Case":
        """The call with only some of the rows."""
        state = None if self.state is None else InPlaceState(*(x[index] for x in self.state))
        return self._cut(lambda x: x[index]).with_state(state)

    def _cut(self, cut: Any) -> "Case":
        names = [name for name in TOKENS if self.tensors[name].dim() > 1]
        flags = {name: cut(self.options[name]) for name in FLAGS if name in self.options}
        cuts = {name: cut(self.tensors[name]) for name in names}
        return self.with_tensors(**cuts).with_options(**flags)


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


def random_flags(case: Case, seed: int, *names: str) -> Case:
    """Add a random `mask`, `document_ids`; with three rows, the last of the mask is all False."""
    generator = torch.Generator().manual_seed(seed)
    batch, time = case.tensors["z"].shape[:2]
    flags: dict[str, Tensor] = {}
    if "mask" in names:
        flags["mask"] = torch.rand(batch, time, generator=generator) > 0.25
        flags["mask"][-1] &= batch < 3
    if "document_ids" in names:
        starts = torch.rand(batch, time, generator=generator) < 2.5 / max(time, 5)
        ids = 5 + starts.cumsum(1)
        flags["document_ids"] = torch.where(ids % 2 == 0, -ids, ids)
    return case.with_options(**flags)


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


def run_in_pieces(case: Case, backend: str, cuts: list[int]) -> tuple[Tensor, InPlaceState]:
    """The same tokens in several calls, cut before the positions in `cuts`, state carried."""
    parts, state = [], case.state
    for start, stop in pairwise([0, *cuts, case.tensors["z"].shape[1]]):
        o, state = case.tokens(slice(start, stop)).with_state(state).run(backend)
        parts.append(o)
    assert state is not None
    return torch.cat(parts, dim=1), state
