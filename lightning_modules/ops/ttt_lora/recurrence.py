"""A linear recurrence of small matrices: N steps in about 2 sqrt(N) products."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


def linear_recurrence(
    transitions: Tensor, inputs: Tensor, start: Tensor, restart: Tensor | None = None
) -> Tensor:
    """The states of `X_{n+1} = T_n X'_n + U_n`, X' being X, or 0 at the steps that restart.

    The steps are cut into C blocks of S, both about sqrt(N). Inside a block each state is an affine
    function of the X the block begins with, `P_n X + B_n`, where

        [P_{n+1} | B_{n+1}] = T_n [P'_n | B'_n] + [0 | U_n],      P = I and B = 0 at its beginning.

    About S products take a step in all blocks at once, C carry the state from block to block, and
    one completes all states. What restarts is filled with zeros, not multiplied by them, so that
    numbers that are not finite end there.

    Args:
        transitions: T, `[N, ..., e, e]`, N at least 1.
        inputs: U, `[N, ..., e, d]`.
        start: `X_0`, `[..., e, d]`.
        restart: bool, `[N, ..., 1, 1]` or what expands to it; None: no step does.

    Returns:
        `X_0` to `X_N`, `[N + 1, ..., e, d]`.
    """
    steps, *batch, rows, columns = inputs.shape
    length = math.ceil(math.sqrt(steps))
    count = -(-steps // length)
    cut = _cut(transitions, length, count), _cut(inputs, length, count, rows)
    fresh = renewed = None
    if restart is not None:
        fresh = _cut(restart.expand(steps, *batch, 1, 1), length, count)
        renewed = fresh.cumsum(0).bool()  # from there on what the block begins with is forgotten
    affine = _step_in_all_blocks(*cut, fresh)
    ends = affine[-1].unflatten(0, (count, -1))
    lost = None if renewed is None else renewed[-1].unflatten(0, (count, -1))
    begins = torch.cat([start.reshape(1, -1, rows, columns), ends[:-1, ..., rows:]])
    for n in range(1, count):
        begins[n].baddbmm_(ends[n - 1, ..., :rows], _filled(begins[n - 1], lost, n - 1))
    own = _filled(begins.flatten(0, 1).expand(length, -1, -1, -1), renewed, ...)
    powers, sums = affine.flatten(0, 1).split([rows, columns], dim=-1)
    states = torch.baddbmm(sums, powers, own.flatten(0, 1))
    states = states.view(length, count, *start.shape).transpose(0, 1).flatten(0, 1)
    return torch.cat([start.unsqueeze(0), states[:steps]])


def _step_in_all_blocks(transitions: Tensor, affine: Tensor, fresh: Tensor | None) -> Tensor:
    """`[P | B]` after each step of a block, into `affine`, `[S, C * R, e, e + d]`.

    Args:
        transitions: T, `[S, C * R, e, e]`.
        affine: `[0 | U]`.
        fresh: steps that restart, `[S, C * R, 1, 1]`.
    """
    affine[0, ..., : transitions.shape[-1]] = transitions[0]
    for n in range(1, len(affine)):
        affine[n].baddbmm_(transitions[n], _filled(affine[n - 1], fresh, n))
    return affine


def _filled(x: Tensor, where: Tensor | None, index: Any) -> Tensor:
    """x, 0 at the places `where[index]`."""
    return x if where is None else x.masked_fill(where[index], 0)


def _cut(x: Tensor, length: int, count: int, left: int = 0) -> Tensor:
    """N steps as C blocks of S, `[N, ..., a, b]` as `[S, C * R, a, left + b]`, R the size of "...".

    The blocks stand side by side, so that a step of all of them is one batch. Zeros fill up the
    last one, and as many columns as `left` says.
    """
    x, missing = x.flatten(1, -3), length * count - len(x)
    if left or missing:
        x = pad(x, (left, 0, 0, 0, 0, 0, 0, missing))
    return x.unflatten(0, (count, length)).transpose(0, 1).flatten(1, 2)
