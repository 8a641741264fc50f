"""The fast weights of LaCT while a call runs: how they begin, change with a chunk, and end."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_modules.ops.lact.block import Triple, ascent
from lightning_modules.ops.lact.muon import newton_schulz
from lightning_modules.ops.processes import sum_over
from lightning_modules.ops.states import LaCTState

EPS = 1e-5


class Rule(NamedTuple):
    """How a chunk changes the weights: keywords of `ops.lact`, and C.

    With a group, the tokens are a share of a chunk of C.
    """

    size: int
    muon: bool
    muon_dtype: torch.dtype
    prenorm: bool
    residual: bool
    greedy: bool
    group: ProcessGroup | None


class Write(NamedTuple):
    """The tokens of a full chunk, `[H, B, C, .]` (with a group, the own); empty slots are 0.

    Attributes:
        k: keys.
        v: values.
        lr: the three rates (per channel: of all channels, `[H, B, C, 3 D]`).
        momentum: coefficients, `[H, B, C, 1]`; None: no momentum.
    """

    k: Tensor
    v: Tensor
    lr: Tensor
    momentum: Tensor | None = None


class Memory(NamedTuple):
    """Fast weights W0, W1, W2 of all rows, `[r, H, B, ., .]` each (B is 1 while rows share them).

    Attributes:
        weights: in use.
        main: before their rows are rescaled, with pre-norm.
        momentum: buffers, with momentum.
        norms: of the rows when the document began, `[r, H, B, ., 1]`.
    """

    weights: Triple
    main: Triple | None
    momentum: Triple | None
    norms: Triple


def learned_memory(weights: Triple, dtype: torch.dtype, momentum: bool, prenorm: bool) -> Memory:
    """What every row starts a document with: the learned weights, `[r, H, ., .]` each."""
    start = each(lambda w: w.to(dtype).unsqueeze(2), weights)
    return Memory(
        start,
        start if prenorm else None,
        each(torch.zeros_like, start) if momentum else None,
        each(_row_norms, start),
    )


def carried_memory(state: LaCTState, learned: Memory) -> Memory:
    """What a state holds.

    Weights without an autograd graph get the gradient of the learned ones they came from, and
    keep their value: scaling their rows again would change it. They are contiguous, as a state
    that was not stored in between has them: other strides are other products in the last bits.
    """
    dtype = learned.weights[0].dtype

    def carry(*fields: Tensor) -> Triple:
        w0, w1, w2 = (x.to(dtype).permute(1, 2, 0, 3, 4).contiguous() for x in fields)
        return w0, w1, w2

    def follow(carried: Triple, start: Triple) -> Triple:
        if state.w0.requires_grad or not any(x.requires_grad for x in start):
            return carried
        return each(lambda x, w: x + (w - w.detach()), carried, start)

    main, momentum = learned.main, learned.momentum
    if main is not None:
        main = follow(carry(state.main_w0, state.main_w1, state.main_w2), main)
    if momentum is not None:
        momentum = carry(state.momentum_w0, state.momentum_w1, state.momentum_w2)
    return Memory(
        follow(carry(state.w0, state.w1, state.w2), learned.weights),
        main,
        momentum,
        carry(state.norm_w0, state.norm_w1, state.norm_w2),
    )


def choose(rows: Tensor, new: Memory, old: Memory) -> Memory:
    """Row by row the one or the other memory; rows is bool `[B]`, True: new."""
    pick = rows.view(-1, 1, 1)

    def mix(a: Triple, b: Triple) -> Triple:
        return each(lambda x, y: torch.where(pick, x, y), a, b)

    return Memory(
        mix(new.weights, old.weights),
        mix(new.main, old.main) if new.main and old.main else None,
        mix(new.momentum, old.momentum) if new.momentum and old.momentum else None,
        mix(new.norms, old.norms),
    )


def written(memory: Memory, tokens: Write, rule: Rule) -> Memory:
    """The memory after a chunk: `M <- g + mean(m) M`, `W <- rows(W + NS5(M))`."""
    k, v, lr, coefficient = tokens
    rates = lr.unflatten(-1, (3, -1)).unbind(-2)
    change = ascent(memory.weights, k, v, rates, rule.residual, rule.greedy)
    mean = None if coefficient is None else coefficient.sum(-2, keepdim=True) / rule.size
    if rule.group is not None:
        change, mean = _over_group(change, mean, rule.group)
    momentum = None
    if mean is not None and memory.momentum is not None:
        momentum = change = each(lambda g, m: torch.addcmul(g, mean, m), change, memory.momentum)
    if rule.muon:
        change = each(lambda g: newton_schulz(g, rule.muon_dtype), change)
    main = each(torch.add, memory.weights if memory.main is None else memory.main, change)
    weights = each(lambda w, n: w * (n / (_row_norms(w) + EPS)), main, memory.norms)
    return Memory(weights, main if rule.prenorm else None, momentum, memory.norms)


def state_fields(memory: Memory, learned: Memory, batch: int) -> list[Tensor]:
    """The fields of a state that the memory fills, in its order, `[B, r, H, ., .]` each.

    What is still the learned weights is copied, or the optimizer's step would change the state.
    """
    theirs = {id(x) for triple in learned if triple is not None for x in triple}

    def export(x: Tensor) -> Tensor:
        if id(x) in theirs:
            x = x.expand(-1, -1, batch, -1, -1).clone()
        return x.permute(2, 0, 1, 3, 4)

    nothing = each(lambda x: x.new_zeros(0, x.shape[1], batch, *x.shape[3:]), memory.weights)
    parts = (memory.weights, memory.main or nothing, memory.momentum or nothing, memory.norms)
    return [export(x) for triple in parts for x in triple]


def _row_norms(w: Tensor) -> Tensor:
    return torch.linalg.vector_norm(w, dim=-1, keepdim=True)


def each(function: Callable[..., Tensor], *triples: Triple) -> Triple:
    """The function of W0s, of W1s and of W2s."""
    w0, w1, w2 = (function(*parts) for parts in zip(*triples, strict=True))
    return w0, w1, w2


def _over_group(
    change: Triple, mean: Tensor | None, group: ProcessGroup
) -> tuple[Triple, Tensor | None]:
    """The sums of the change and of the coefficient over the processes, in one message."""
    parts = [*change] if mean is None else [*change, mean]
    flat = sum_over(torch.cat([x.flatten() for x in parts]), group)
    pieces = flat.split([x.numel() for x in parts])
    c0, c1, c2, *rest = (x.view_as(y) for x, y in zip(pieces, parts, strict=True))
    return (c0, c1, c2), rest[0] if rest else None
