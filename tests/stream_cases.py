"""Calls of an op that reads a stream: cut by tokens and rows, with flags, in pieces."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

FLAGS = ("mask", "write_mask", "document_ids")


@dataclass(frozen=True)
class StreamCase:
    """Arguments of one call: `tensors` are differentiable, `options` are the other keywords.

    A subclass names in `TOKENS` the tensors that have a row and a time axis, and calls its op in
    `run`.
    """

    TOKENS: ClassVar[tuple[str, ...]]

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    state: Any = None

    def with_tensors(self, **tensors: Tensor) -> Self:
        """The same call with other tensors."""
        return replace(self, tensors={**self.tensors, **tensors})

    def with_options(self, **options: Any) -> Self:
        """The same call with other keywords."""
        return replace(self, options={**self.options, **options})

    def with_state(self, state: Any) -> Self:
        """The same call from another state."""
        return replace(self, state=state)

    def tokens(self, index: Any) -> Self:
        """The call with only some of the tokens (any index of the time axis)."""
        return self._cut(lambda x: x[:, index])

    def rows(self, index: Any) -> Self:
        """The call with only some of the rows."""
        state = None if self.state is None else type(self.state)(*(x[index] for x in self.state))
        return self._cut(lambda x: x[index]).with_state(state)

    def _cut(self, cut: Any) -> Self:
        cuts = {
            name: cut(self.tensors[name])
            for name in self.TOKENS
            if name in self.tensors and self.tensors[name].dim() > 1
        }
        flags = {name: cut(self.options[name]) for name in FLAGS if name in self.options}
        return self.with_tensors(**cuts).with_options(**flags)


def _tokens_of(case: Any) -> Tensor:
    return case.tensors["q" if "q" in case.tensors else "z"]


def random_flags(case: Any, seed: int, *names: str) -> Any:
    """Add a random `mask`, `write_mask`, `document_ids`; with three rows, the last of the mask is
    all False."""
    generator = torch.Generator().manual_seed(seed)
    batch, time = _tokens_of(case).shape[:2]
    flags: dict[str, Tensor] = {}
    if "mask" in names:
        flags["mask"] = torch.rand(batch, time, generator=generator) > 0.25
        flags["mask"][-1] &= batch < 3
    if "write_mask" in names:
        flags["write_mask"] = torch.rand(batch, time, generator=generator) > 0.3
    if "document_ids" in names:
        starts = torch.rand(batch, time, generator=generator) < 2.5 / max(time, 5)
        ids = 5 + starts.cumsum(1)
        flags["document_ids"] = torch.where(ids % 2 == 0, -ids, ids)
    return case.with_options(**flags)


def run_in_pieces(case: Any, backend: str, cuts: list[int], **options: Any) -> tuple[Tensor, Any]:
    """The same tokens in several calls, cut before the positions in `cuts`, state carried.

    `options` are of the last call.
    """
    time = _tokens_of(case).shape[1]
    parts, state = [], case.state
    for start, stop in pairwise([0, *cuts, time]):
        part = case.tokens(slice(start, stop)).with_state(state)
        o, state = part.run(backend, **(options if stop == time else {}))
        parts.append(o)
    return torch.cat(parts, dim=1), state
