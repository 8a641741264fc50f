"""Cross-attention from tokens to the rows of a memory bank."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_modules.layers.memory_bank import (
    MemoryBank,
    QuantizedBank,
    chapter_rows,
    check_chapters,
)
from lightning_modules.layers.memory_options import MemoryAttentionConfig, RouterConfig
from lightning_modules.ops import chapter_attention

if TYPE_CHECKING:
    from lightning_modules.layers.chapter_router import Routing


class LowRank(nn.Module):
    """`up(down(x))`, drawn so that its entries vary as those of `nn.Linear`.

    Args:
        in_features: channels of x.
        out_features: channels of the result.
        rank: channels between.
    """

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """`down` as `nn.Linear`; `up` uniform with variance 1 / rank."""
        self.down.reset_parameters()
        bound = math.sqrt(3 / self.up.in_features)
        nn.init.uniform_(self.up.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        return self.up(self.down(x))


class MemoryAttention(nn.Module):
    """Every token reads the bank, or the chapters of it that a router chose.

        Q = x Wq,  K = M Wk,  V = M Wv,  out = softmax(Q K^T / sqrt(D)) V Wo

    per head of D channels, without positions. With a router the softmax is over the rows of chosen
    and shared chapters, as `ops.chapter_attention` says. x is what the caller has normalised. Wo
    (low rank: its `up`) is zero at initialisation, so that a model starts exactly as its base.

    The bank is an argument and no part of this module, as layers may share one.

    Args:
        hidden_size: channels of x and of the output.
        bank_width: channels of a row of the bank.
        inner_width: channels of all heads together: the hidden size or, for a reduced bank, its
            rank.
        config: heads, rank of the projections, dropout.

    Raises:
        ValueError: `inner_width` is not divisible by the heads.
    """

    def __init__(
        self, hidden_size: int, bank_width: int, inner_width: int, config: MemoryAttentionConfig
    ) -> None:
        super().__init__()
        if inner_width % config.num_heads:
            raise ValueError(
                f"attention.num_heads={config.num_heads} does not divide the width of memory "
                f"attention, {inner_width} (the hidden size or, for a reduced bank, bank.rank): "
                f"choose one of {_divisors(inner_width)} heads"
                + ("" if inner_width == hidden_size else ", or another bank.rank")
            )
        self.config = config
        self.bank_width, self.head_dim = bank_width, inner_width // config.num_heads
        kv_width = config.kv_heads * self.head_dim
        self.query = _projection(hidden_size, inner_width, config.rank)
        self.key = _projection(bank_width, kv_width, config.rank)
        self.value = _projection(bank_width, kv_width, config.rank)
        self.output = _projection(inner_width, hidden_size, config.rank)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the projections as `nn.Linear` does, and set that of the output to zero."""
        for projection in (self.query, self.key, self.value, self.output):
            projection.reset_parameters()
        last = self.output.up if isinstance(self.output, LowRank) else self.output
        nn.init.zeros_(last.weight)

    def project(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of rows.

        Args:
            rows: `[..., R, bank_width]` of any floating dtype.

        Returns:
            Two tensors `[..., R, Hkv, D]`.

        Raises:
            ValueError: rows of another width.
        """
        if rows.shape[-1] != self.bank_width:
            raise ValueError(
                f"the bank has rows of {rows.shape[-1]} channels, but this memory attention was "
                f"made for {self.bank_width}: give it the bank's width as bank_width"
            )
        rows, heads = rows.to(self._dtype), (self.config.kv_heads, self.head_dim)
        return self.key(rows).unflatten(-1, heads), self.value(rows).unflatten(-1, heads)

    def project_bank(self, bank: MemoryBank, num_chapters: int = 1) -> tuple[Tensor, Tensor]:
        """Keys and values of all rows: once per call in training, once for all in generation.

        A quantised bank is computed in full precision for it.

        Args:
            bank: N rows.
            num_chapters: C; 1 without a router.

        Returns:
            Two tensors `[C, R, Hkv, D]`, R = N / C, which take `projected_bytes`.

        Raises:
            ValueError: C does not divide N.
        """
        rows_per_chapter = check_chapters(bank.num_rows, num_chapters)
        keys, values = self.project(bank.rows())
        chapters = (num_chapters, rows_per_chapter)
        return keys.unflatten(0, chapters), values.unflatten(0, chapters)

    def projected_bytes(self, num_rows: int, dtype: torch.dtype | None = None) -> int:
        """Bytes of the keys and values of so many rows; dtype None is that of the projections."""
        channels = 2 * self.config.kv_heads * self.head_dim
        return num_rows * channels * (self._dtype if dtype is None else dtype).itemsize

    def forward(
        self,
        hidden_states: Tensor,
        bank: MemoryBank,
        routing: Routing | None = None,
        router_config: RouterConfig | None = None,
        projected: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Read the bank.

        Args:
            hidden_states: x, `[B, T, hidden]`, of any floating dtype.
            bank: N rows. A quantised bank in front of which a router stands is only computed in
                the chapters that some token reads; finding them waits for the device, as fits
                deployment. Any other bank is projected whole, once for all rows of the batch.
            routing: which chapters are read, and with which weights; None reads all rows.
            router_config: of the router that made `routing`.
            projected: keys and values from `project_bank`, which then is not called.

        Returns:
            `[B, T, hidden]` in the dtype of `hidden_states`.

        Raises:
            ValueError: `routing` without `router_config`; chapters do not divide the rows;
                `projected` has another number of chapters than the router.
        """
        query = self.query(hidden_states.to(self._dtype))
        query = query.unflatten(-1, (self.config.num_heads, self.head_dim))
        chapters = None if routing is None else routing.chapters
        if routing is not None and router_config is None:
            raise ValueError("routing came without router_config: pass the options of its router")
        num_chapters = 1 if routing is None else router_config.num_chapters
        if projected is None and chapters is not None and isinstance(bank, QuantizedBank):
            projected, chapters = self._project_chosen(bank, chapters, router_config)
        elif projected is None:
            projected = self.project_bank(bank, num_chapters)
        elif chapters is not None and projected[0].shape[0] != num_chapters:
            raise ValueError(
                f"projected has {projected[0].shape[0]} chapters, the router {num_chapters}: make "
                "it by project_bank(bank, router.num_chapters)"
            )
        # Keys that were projected under another autocast may differ from the queries in dtype.
        keys, values = (part.to(query.dtype) for part in projected)
        options = {} if routing is None else _routed_options(routing, router_config)
        dropout = self.config.dropout if self.training else 0.0
        read = chapter_attention(query, keys, values, chapters, dropout=dropout, **options)
        return self.output(read.flatten(-2)).to(hidden_states.dtype)

    def _project_chosen(
        self, bank: QuantizedBank, chapters: Tensor, router: RouterConfig
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Keys and values `[C', R, Hkv, D]` of the chapters in use, and their new numbers.

        Shared chapters come first under both numbers, as `unique` sorts.
        """
        rows_per_chapter = check_chapters(bank.num_rows, router.num_chapters)
        shared = torch.arange(router.shared, device=chapters.device)
        used, numbers = torch.cat([shared, chapters.flatten()]).unique(return_inverse=True)
        keys, values = self.project(bank.read(chapter_rows(used, rows_per_chapter)))
        parts = (-1, rows_per_chapter)
        renamed = numbers[router.shared :].view_as(chapters)
        return (keys.unflatten(0, parts), values.unflatten(0, parts)), renamed

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def extra_repr(self) -> str:
        """Options, for `print(model)`."""
        return str(self.config)


def _routed_options(routing: Routing, router: RouterConfig) -> dict[str, object]:
    return {
        "log_weights": routing.log_weights,
        "block_size": routing.block_size,
        "shared": router.shared,
        "shared_mode": router.shared_mode,
        "mixing": router.mixing,
    }


def _projection(in_features: int, out_features: int, rank: int | None) -> nn.Linear | LowRank:
    if rank is None:
        return nn.Linear(in_features, out_features, bias=False)
    return LowRank(in_features, out_features, rank)


def _divisors(width: int) -> str:
    return ", ".join(str(n) for n in range(1, width + 1) if width % n == 0)
