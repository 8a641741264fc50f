"""Rows that processes share: an op's calls in every process, against one that has all tokens."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from stream_cases import StreamCase
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce
from ttt_cases import relative_error

TOLERANCE = 1e-10
"""Float64: sums over tokens in another order."""


class Result(NamedTuple):
    """What one or more calls gave: outputs, the last state, gradients of `sum(weight * o)`."""

    o: Tensor
    state: Any
    gradients: dict[str, Tensor]


def read_calls(
    case: StreamCase, lengths: Sequence[int], choose: Callable[[int, int], slice], **options: Any
) -> Result:
    """Read the case in calls that carry the state on, with gradients through all of them.

    Args:
        case: with a tensor `weight` like the outputs.
        lengths: tokens of the calls, of all processes together.
        choose: of a call's start and end, which tokens are read here.
        **options: of the op.
    """
    leaves = {name: x.detach().clone().requires_grad_() for name, x in case.tensors.items()}
    weight = leaves.pop("weight").detach()
    bounds = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    outputs, losses, state = [], [], case.state
    for start, stop in pairwise(bounds):
        here = choose(start, stop)
        call = type(case)(leaves, case.options).tokens(here).with_state(state)
        o, state = call.run("torch", **options)
        outputs.append(o.detach())
        losses.append((weight[:, here] * o).sum())
    inputs = list(leaves.values())
    gradients = torch.autograd.grad(torch.stack(losses).sum(), inputs, materialize_grads=True)
    found = dict(zip(leaves, gradients, strict=True))
    return Result(torch.cat(outputs, dim=1), state, found)


def weighted(case: StreamCase, outputs: Tensor) -> StreamCase:
    """The case with random weights of its outputs."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(outputs.shape, dtype=torch.float64, generator=generator)
    return case.with_tensors(weight=weight)


def part(group: ProcessGroup) -> Callable[[int, int], slice]:
    """The own part of the tokens of a call."""

    def choose(start: int, stop: int) -> slice:
        own = (stop - start) // group.size()
        assert own * group.size() == stop - start
        return slice(start + group.rank() * own, start + (group.rank() + 1) * own)

    return choose


def own_tokens(lengths: Sequence[int], group: ProcessGroup) -> list[int]:
    """Which tokens of all calls are the own ones."""
    bounds = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    choose = part(group)
    return [t for start, stop in pairwise(bounds) for t in range(*_ends(choose(start, stop)))]


def _ends(part: slice) -> tuple[int, int]:
    return part.start, part.stop


def distance(actual: Result, expected: Result, own: list[int], per_token: Sequence[str]) -> float:
    """Largest relative error of outputs, state and gradients; integers must be equal.

    Args:
        actual: of this process.
        expected: of one process with all tokens.
        own: the tokens of this process.
        per_token: tensors that have tokens: their gradients are compared where they are, those of
            others are summed over the processes.
    """
    errors = [relative_error(actual.o, expected.o[:, own])]
    for name, value in expected.state._asdict().items():
        found = getattr(actual.state, name)
        if value.is_floating_point() and value.numel():
            errors.append(relative_error(found, value))
        elif not value.is_floating_point():
            assert torch.equal(found, value), name
    for name, gradient in actual.gradients.items():
        whole = expected.gradients[name]
        if name in per_token and whole.dim() > 1:
            errors.append(relative_error(gradient[:, own], whole[:, own]))
        else:
            all_reduce(gradient)
            errors.append(relative_error(gradient, whole))
    return max(errors)
