"""Routers, batches and the loop that their decisions are compared with."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_modules.layers.chapter_router import ChapterRouter, Routing
from lightning_modules.layers.memory_options import RouterConfig
from lightning_modules.layers.pooling import RouterState

B, T, D, BLOCK, WINDOW = 4, 15, 6, 4, 5
CAUSAL = ("token", "block", "rolling", "prompt")
CARRYING = ("block", "rolling", "prompt", "sequence")


class Batch(NamedTuple):
    """A call: hidden states `[B, T, d]`, and what else it has, `[B, T]` or None."""

    x: Tensor
    mask: Tensor | None = None
    documents: Tensor | None = None
    prompt: Tensor | None = None

    def part(self, begin: int, end: int | None = None) -> Batch:
        """The tokens `begin` to `end`."""
        return Batch(*(None if v is None else v[:, begin:end] for v in self))

    def rows(self, *rows: int) -> Batch:
        """These rows."""
        return Batch(*(None if v is None else v[list(rows)] for v in self))

    @property
    def real(self) -> Tensor:
        if self.mask is not None:
            return self.mask
        return torch.ones(self.x.shape[:2], dtype=torch.bool)


def make_router(strategy: str, **options: Any) -> ChapterRouter:
    """A router in float64 whose choices differ from token to token."""
    settings = {"num_chapters": 7, "top_k": 2, "shared": 1, "block_size": BLOCK, "window": WINDOW}
    settings |= {"strategy": strategy, "allow_non_causal": strategy == "sequence"} | options
    torch.manual_seed(0)
    router = ChapterRouter(D, RouterConfig(**settings)).double()
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_()
    return router


def batch(kind: str = "plain", length: int = T) -> Batch:
    """`plain`; or with `masked` tokens (left, right, in the middle), `documents`, or `both`."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, length, D, generator=generator, dtype=torch.float64)
    prompt = torch.rand(B, length, generator=generator) < 0.6
    mask = torch.rand(B, length, generator=generator) < 0.8
    mask[0], mask[1, :5], mask[2, length - 6 :] = True, False, False
    starts = torch.rand(B, length, generator=generator) < 0.2
    documents = starts.long().cumsum(1) + 3
    return Batch(
        x,
        mask if kind in ("masked", "both") else None,
        documents if kind in ("documents", "both") else None,
        prompt,
    )


def run(router: ChapterRouter, given: Batch, state: Any = None, **options: Any) -> Routing:
    """The routing of a batch."""
    return router(
        given.x,
        mask=given.mask,
        document_ids=given.documents,
        prompt_mask=given.prompt if router.config.strategy == "prompt" else None,
        state=state,
        **options,
    )


def per_token(routing: Routing, length: int) -> tuple[Tensor, Tensor]:
    """Chapters and log weights of every token, `[B, T, k]`."""
    chapters, weights = (
        value.repeat_interleave(routing.block_size, 1)[:, :length]
        for value in (routing.chapters, routing.log_weights)
    )
    return chapters, weights


def assert_same(actual: Any, expected: Any, where: Tensor | None = None) -> None:
    """The same chapters, and weights up to the rounding of sums in another order."""
    (chapters, weights), (chapters_, weights_) = actual, expected
    if where is not None:
        chapters, weights, chapters_, weights_ = (
            v[where] for v in (chapters, weights, chapters_, weights_)
        )
    assert torch.equal(chapters, chapters_)
    torch.testing.assert_close(weights, weights_, rtol=1e-11, atol=1e-11)


def fresh_like(state: RouterState) -> RouterState:
    """The state that is all zeros."""
    return RouterState(*(torch.zeros_like(value) for value in state))


def naive_inputs(router: ChapterRouter, given: Batch) -> Tensor:
    """What every real token is routed on, `[B, T, d]`, one token after the other."""
    config, out = router.config, given.x.clone()
    for row in range(given.x.shape[0]):
        real = given.real[row].tolist()
        first = real.index(True) if any(real) else 0
        for t in range(given.x.shape[1]):
            if real[t]:
                seen = [s for s in _candidates(config, given, row, t, first) if real[s]]
                seen = [s for s in seen if _same(given, row, s, t)]
                if seen:
                    out[row, t] = given.x[row, seen].mean(0)
                else:
                    out[row, t] = router.default_vector
    return out


def _candidates(config: RouterConfig, given: Batch, row: int, t: int, first: int) -> list[int]:
    """Places that a decision at token t may look at, documents and masks apart."""
    if config.strategy == "token":
        return [t]
    if config.strategy == "block":
        return list(range(first, t - (t - first) % config.block_size))
    if config.strategy == "rolling":
        return list(range(max(t - config.window + 1, 0), t + 1))
    if config.strategy == "prompt":
        return [s for s in range(t + 1) if given.prompt is None or given.prompt[row, s]]
    return list(range(given.x.shape[1]))


def _same(given: Batch, row: int, s: int, t: int) -> bool:
    return given.documents is None or bool(given.documents[row, s] == given.documents[row, t])
