"""What a call of LaCT's chain is: its sizes, its tensors, and all versions of its weights."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules.ops.lact import stack
from lightning_modules.ops.lact.launch_tokens import gather
from lightning_modules.ops.lact.launch_weights import Norms
from lightning_modules.ops.lact.sizes import Pair, Sizes
from lightning_modules.ops.lact.walk import Change, Walk


class Call(NamedTuple):
    """What a call is beside its tensors.

    Attributes:
        sizes: of its tensors.
        form: of its stacks.
        walk: through its chunks.
        size: C.
        muon_dtype: None: no Muon.
        prenorm: as in the op.
        masked: whether tokens of the call may be in no chunk.
        trains: whether there may be a backward pass.
    """

    sizes: Sizes
    form: stack.Form
    walk: Walk
    size: int
    muon_dtype: torch.dtype | None
    prenorm: bool
    masked: bool
    trains: bool

    def pairs(self, blocks: Tensor, first: int, count: int) -> list[Pair]:
        """Versions `[r, V, G, 3 F D]` from `first` on, of each block a pair with S * G matrices."""
        return [self.sizes.pair(x[first : first + count].flatten(0, 1)) for x in blocks]

    def each_version(self, blocks: Tensor) -> list[list[Pair]]:
        """All versions `[r, V, G, 3 F D]`, of each the pairs of its blocks.

        The host is what a small call waits for: views are made once here, not chunk by chunk.
        """
        each_block = [zip(*(x.unbind() for x in self.sizes.pair(y)), strict=True) for y in blocks]
        return [list(pairs) for pairs in zip(*each_block, strict=True)]


class Inputs(NamedTuple):
    """The tensors that `Chain` takes, in this order; gradients come in the same order.

    Attributes:
        q: `[B, T, H, D]`; so are k and v.
        k: keys.
        v: values.
        rates: `[B, T, H, 3]`, or 4 with the momentum's coefficient.
        held_k: of the state, `[B, C, H, D]`; None: nothing is held.
        held_v: likewise.
        held_rates: `[B, C, H, 3 or 4]`.
        start: packed weights, `[r, G, 3 F D]`.
        main: likewise, with pre-norm.
        momentum: likewise, with momentum.
        norms: of the rows, `[r, G, 2 F + D]`.
        learned: packed weights with which documents begin; None: none does.
        learned_norms: of their rows.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rates: Tensor
    held_k: Tensor | None
    held_v: Tensor | None
    held_rates: Tensor | None
    start: Tensor
    main: Tensor | None
    momentum: Tensor | None
    norms: Tensor
    learned: Tensor | None
    learned_norms: Tensor | None


class Versions(NamedTuple):
    """All weights of a call, `[r, V, G, 3 F D]` each.

    Attributes:
        main: W before its rows are scaled, after every change; V = 1 without a backward pass.
        low: W as products read it.
        momentum: sums that momentum or Muon take, likewise; None without both.
        mean: of the momentum's coefficients of each written chunk, `[N, G]`; None without.
    """

    main: Tensor
    low: Tensor
    momentum: Tensor | None
    mean: Tensor | None


def written_tokens(call: Call, x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and rates of the chunks that are written, `[N, G, C, .]`."""
    block, low = call.walk.writes, call.sizes.low
    return (
        gather(x.k, x.held_k, block, low),
        gather(x.v, x.held_v, block, low),
        gather(x.rates, x.held_rates, block, x.start.dtype),
    )


class Rows(NamedTuple):
    """A block's weights as kernels on rows take them (views).

    Attributes:
        main: of each kept version, `[G, 3 F D]`.
        low: of each version.
        norms: of its rows.
        learned: with which documents begin; None: none does.
    """

    main: tuple[Tensor, ...]
    low: tuple[Tensor, ...]
    norms: Norms
    learned: Tensor | None


def rows_of(x: Inputs, versions: Versions) -> list[Rows]:
    """Those of each block."""
    blocks = zip(versions.main, versions.low, x.norms, strict=True)
    return [
        Rows(
            main.unbind(),
            low.unbind(),
            Norms(norms, None if x.learned_norms is None else x.learned_norms[j]),
            None if x.learned is None else x.learned[j],
        )
        for j, (main, low, norms) in enumerate(blocks)
    ]


def mean_of(versions: Versions, change: Change) -> Tensor | None:
    """Mean coefficient of the chunk that a change writes, `[G]`; None without one."""
    if versions.mean is None or change.write is None:
        return None
    return versions.mean[change.write]
