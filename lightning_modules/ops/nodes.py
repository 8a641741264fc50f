"""Tensors on their way through nodes in the graphs of `torch.compile`."""

from collections.abc import Iterable, Sequence

from torch import Tensor


def there(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    """The tensors that are not None."""
    return [x for x in tensors if x is not None]


def with_gaps(tensors: Sequence[Tensor], given: Sequence[int]) -> list[Tensor | None]:
    """The inverse of `there`; given is 1 for a tensor, 0 for None."""
    rest = iter(tensors)
    return [next(rest) if is_given else None for is_given in given]


def unshared(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, contiguous, copies where two have one memory: results of a node share none."""
    seen: set[int] = set()
    out = []
    for x in map(Tensor.contiguous, tensors):
        place = x.untyped_storage()._cdata
        out.append(x.clone() if place in seen else x)
        seen.add(place)
    return out
