"""Banks of learned rows, and the frozen, rounded bank that a trained one becomes.

A bank only holds rows; chapters are runs of consecutive ones, and `MemoryAttention` reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.layers.memory_options import BankConfig
from lightning_modules.ops import dequantize_rows, quantize_rows

INIT_STD = 0.02
"""Standard deviation of the entries of a new bank's rows."""


class MemoryBank(nn.Module):
    """N rows of so many channels; a subclass says in `values` where they come from.

    Args:
        num_rows: N.
        width: channels of a row.
        bits: 8 or 4 reads the rows as a quantised bank would hold them, with the gradient of
            reading them as they are; None reads them as they are.

    Raises:
        ValueError: 4 bits and an odd width, of which the last column would have no partner.
    """

    def __init__(self, num_rows: int, width: int, bits: int | None = None) -> None:
        super().__init__()
        if bits == 4 and width % 2:
            raise ValueError(
                f"a bank of 4 bits keeps two columns in a byte, but its rows have {width}: choose "
                "an even width (bank.rank of a reduced bank), or 8 bits"
            )
        self.num_rows, self.width, self.bits = num_rows, width, bits

    def values(self, rows: Tensor | None = None) -> Tensor:
        """Rows before they are rounded, `[n, width]` for numbers int64 `[n]`; None: all."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its rows are")

    def rows(self) -> Tensor:
        """All rows, `[N, width]`."""
        return self._read(None)

    def read(self, rows: Tensor) -> Tensor:
        """Rows by number, int64 `[n]`, each in `[0, N)`; `[n, width]`.

        Only they are computed. The gradient of a row is the sum over its reads, and exactly 0 if
        nobody read it.
        """
        return self._read(rows)

    def _read(self, rows: Tensor | None) -> Tensor:
        values = self.values(rows)
        return values if self.bits is None else _Rounded.apply(values, self.bits)

    def quantized(self, bits: int) -> QuantizedBank:
        """A frozen copy whose rows take so many bits (8 or 4) per channel.

        A bank trained with the same bits reads bit for bit the same from it, apart from the order
        in which a factorised bank's matrix product adds.
        """
        bank = QuantizedBank(self.num_rows, self.width, bits)
        with torch.no_grad():
            codes, scale = quantize_rows(self.values(), bits)
        bank.codes, bank.scale = codes, scale
        return bank

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"num_rows={self.num_rows}, width={self.width}, bits={self.bits}"


class StandardBank(MemoryBank):
    """One parameter `[N, width]`, drawn from N(0, 0.02).

    Args:
        num_rows: N.
        width: as in `MemoryBank`.
        bits: as in `MemoryBank`.
    """

    def __init__(self, num_rows: int, width: int, bits: int | None = None) -> None:
        super().__init__(num_rows, width, bits)
        self.weight = nn.Parameter(torch.empty(num_rows, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the rows."""
        nn.init.normal_(self.weight, std=INIT_STD)

    def values(self, rows: Tensor | None = None) -> Tensor:
        """The parameter or, by embedding lookup, some of its rows; see `MemoryBank.values`."""
        return self.weight if rows is None else F.embedding(rows, self.weight)


class FactorizedBank(MemoryBank):
    """Rows of `A B^T`, A `[N, rank]` and B `[width, rank]`.

    A and B are drawn from N(0, s), `s^2 sqrt(rank) = 0.02`, so that entries of the product have
    the standard deviation of a standard bank's. With `bits` the product is what is rounded.

    Args:
        num_rows: N.
        width: as in `MemoryBank`.
        rank: columns of A and B.
        bits: as in `MemoryBank`.
    """

    def __init__(self, num_rows: int, width: int, rank: int, bits: int | None = None) -> None:
        super().__init__(num_rows, width, bits)
        self.left = nn.Parameter(torch.empty(num_rows, rank))
        self.right = nn.Parameter(torch.empty(width, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A and B."""
        std = math.sqrt(INIT_STD / math.sqrt(self.left.shape[1]))
        nn.init.normal_(self.left, std=std)
        nn.init.normal_(self.right, std=std)

    def values(self, rows: Tensor | None = None) -> Tensor:
        """The product, or some of its rows; see `MemoryBank.values`."""
        left = self.left if rows is None else F.embedding(rows, self.left)
        return left @ self.right.T


class QuantizedBank(MemoryBank):
    """Rows as integers with one scale each: frozen, for deployment.

    Codes and scales are buffers; there are no parameters. A new one is all zeros: make one by
    `MemoryBank.quantized`, or load it from a checkpoint. `read` computes the rows that it is asked
    for and no others; `rows` is a bank in full precision, which only attention without a router
    needs.

    Args:
        num_rows: N.
        width: as in `MemoryBank`.
        bits: 8, or 4 with two columns in a byte.
    """

    def __init__(self, num_rows: int, width: int, bits: int) -> None:
        super().__init__(num_rows, width, bits)
        codes = torch.zeros(num_rows, width if bits == 8 else width // 2, dtype=torch.int8)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", torch.zeros(num_rows))

    def values(self, rows: Tensor | None = None) -> Tensor:
        """`codes * scale` in the dtype of the scales; see `MemoryBank.values`."""
        return dequantize_rows(self.codes, self.scale, rows, self.bits)

    def _read(self, rows: Tensor | None) -> Tensor:
        return self.values(rows)  # rounding what was rounded would change nothing

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move as other modules do, but keep the scales in float32 at least.

        127 times the rounding error of a bfloat16 scale would be a quarter of a step.
        """
        exact = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype.itemsize < exact.dtype.itemsize:
            self.scale = exact.to(self.scale.device)
        return self


class _Rounded(torch.autograd.Function):
    """`dequantize(quantize(rows))` with the gradient of the identity (arXiv:1308.3432)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, bits: int) -> Tensor:
        codes, scale = quantize_rows(rows, bits)
        return dequantize_rows(codes, scale, None, bits).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class BankReader(nn.Module):
    """A layer that reads a bank which is another module's: several layers may share one.

    Args:
        bank: the rows.
    """

    def __init__(self, bank: MemoryBank) -> None:
        super().__init__()
        self.attach(bank)

    def attach(self, bank: MemoryBank) -> None:
        """Read this bank from now on."""
        # In a tuple it is no submodule: its weights have one name, that of their owner.
        self._held = (bank,)

    @property
    def bank(self) -> MemoryBank:
        """The rows that are read."""
        return self._held[0]


def make_bank(config: BankConfig, hidden_size: int) -> MemoryBank:
    """The bank that the options describe.

    Args:
        config: options.
        hidden_size: of the model, the width where the options leave it open.

    Raises:
        ValueError: 4 bits and an odd width.
    """
    width = hidden_size if config.width is None else config.width
    if config.kind == "standard":
        return StandardBank(config.num_rows, width, config.bits)
    assert config.rank is not None  # BankConfig checks it
    if config.kind == "reduced":
        return StandardBank(config.num_rows, config.rank, config.bits)
    return FactorizedBank(config.num_rows, width, config.rank, config.bits)


def check_chapters(num_rows: int, num_chapters: int) -> int:
    """Rows of a chapter, R = N / C.

    Raises:
        ValueError: C does not divide N; the message names the nearest sizes that it does.
    """
    if num_rows % num_chapters == 0:
        return num_rows // num_chapters
    below = num_rows // num_chapters * num_chapters
    sizes = [str(size) for size in (below, below + num_chapters) if size]
    raise ValueError(
        f"bank.num_rows={num_rows} is not divisible by router.num_chapters={num_chapters}: set "
        f"bank.num_rows to {' or '.join(sizes)}"
    )


def chapter_rows(chapters: Tensor, rows_per_chapter: int) -> Tensor:
    """Numbers of the rows of chapters: chapter c is rows `c R` to `(c + 1) R - 1`.

    Args:
        chapters: int64 `[..., k]`.
        rows_per_chapter: R.

    Returns:
        int64 `[..., k R]`.
    """
    within = torch.arange(rows_per_chapter, device=chapters.device)
    return (chapters.unsqueeze(-1) * rows_per_chapter + within).flatten(-2)
