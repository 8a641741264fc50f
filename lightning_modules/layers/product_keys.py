"""Product-key memory: every token reads its k best of n^2 rows (arXiv:1907.05242, 2412.09764)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.layers.memory_bank import BankReader, StandardBank
from lightning_modules.ops.ttt_eager import autocast_device


@dataclass(frozen=True)
class ProductKeyConfig:
    """Size of a product-key memory.

    Args:
        num_keys: n, sub-keys in each of the two tables of a head; the bank has n^2 rows.
        num_heads: heads, each with its own queries and keys. All read the same rows.
        top_k: rows that a head reads per token.
        key_width: channels of a query; each half of them meets one of the two tables.
        value_width: channels of a row; None takes the hidden size of the model.
    """

    num_keys: int = 256
    num_heads: int = 4
    top_k: int = 32
    key_width: int = 512
    value_width: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_keys", "num_heads", "top_k", "key_width", "value_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"product_keys.{name}={value} must be at least 1")
        if self.top_k > self.num_keys:
            raise ValueError(
                f"product_keys.top_k={self.top_k} of num_keys={self.num_keys}: choose at most "
                "num_keys, as the k best products are found among the k best of each table"
            )
        if self.key_width % 2:
            raise ValueError(
                f"product_keys.key_width={self.key_width} must be even: its halves meet one table "
                "of sub-keys each"
            )

    def make_bank(self, hidden_size: int) -> StandardBank:
        """The rows, `[n^2, value_width]`."""
        width = hidden_size if self.value_width is None else self.value_width
        return StandardBank(self.num_keys**2, width)


class ProductKeyMemory(BankReader):
    """A bank of n^2 rows V of which every token reads a few, found among 2n sub-keys.

    Per head, with the halves q1 and q2 of `q = x Wq` and tables K1 and K2 of n sub-keys:

        s(i, j) = q1 . K1[i] + q2 . K2[j]                  n^2 scores
        I = the k pairs with the largest s,                w = softmax(s[I])
        read = sum over heads and (i, j) in I of w(i, j) V[i n + j]
        out = (read * silu(x Wg)) Wo

    (arXiv:1907.05242, section 3; the gate is that of arXiv:2412.09764, section 3.)
    The k best pairs are exactly those among k x k, the products of the k best of each table: a
    pair outside has k better ones in its own row or column. Wo is zero at initialisation, so that
    a model starts exactly as its base. Every token is treated by itself.

    Args:
        hidden_size: channels of x and of the output.
        config: sizes.
        bank: the rows, as `config.make_bank` makes them.
    """

    def __init__(self, hidden_size: int, config: ProductKeyConfig, bank: StandardBank) -> None:
        super().__init__(bank)
        heads, n, half = config.num_heads, config.num_keys, config.key_width // 2
        width = bank.width
        self.config = config
        self.query = nn.Linear(hidden_size, heads * config.key_width, bias=False)
        self.keys = nn.Parameter(torch.empty(2, heads, n, half))
        self.gate = nn.Linear(hidden_size, width, bias=False)
        self.output = nn.Linear(width, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw sub-keys uniformly within `1 / sqrt(key_width / 2)`, and set Wo to zero."""
        for part in (self.query, self.gate):
            part.reset_parameters()
        bound = self.keys.shape[-1] ** -0.5
        nn.init.uniform_(self.keys, -bound, bound)
        nn.init.zeros_(self.output.weight)

    def select(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows a token reads, and with which weights.

        Scores are float32 at least, also under autocast: in bfloat16 close ones would tie.

        Args:
            hidden_states: x, `[B, T, hidden]`.

        Returns:
            Numbers of rows, int64 `[B, T, H, k]`, and weights of the same shape, sum 1 over k.
        """
        n, k = self.config.num_keys, self.config.top_k
        query = self.query(hidden_states.to(self.query.weight.dtype))
        query = query.unflatten(-1, (self.config.num_heads, 2, -1))
        dtype = torch.promote_types(query.dtype, torch.float32)
        with torch.autocast(autocast_device(query.device), enabled=False):
            scores = torch.einsum("bthic,ihnc->bthin", query.to(dtype), self.keys.to(dtype))
            best, at = scores.topk(k, dim=-1)  # [B, T, H, 2, k]
            pairs = best[..., 0, :, None] + best[..., 1, None, :]
            best, chosen = pairs.flatten(-2).topk(k, dim=-1)
            rows = at[..., 0, :, None] * n + at[..., 1, None, :]
            return rows.flatten(-2).gather(-1, chosen), best.softmax(dim=-1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Read the bank.

        Args:
            hidden_states: x, `[B, T, hidden]`, of any floating dtype.

        Returns:
            `[B, T, hidden]` in the dtype of `hidden_states`.
        """
        rows, weights = self.select(hidden_states)
        table = self.bank.weight
        read = F.embedding_bag(
            rows.flatten(0, 1).flatten(1),
            table,
            mode="sum",
            per_sample_weights=weights.flatten(0, 1).flatten(1).to(table.dtype),
        )
        x = hidden_states.to(self.gate.weight.dtype)
        read = read.unflatten(0, x.shape[:2]).to(x.dtype)
        return self.output(read * F.silu(self.gate(x))).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        """Options, for `print(model)`."""
        return str(self.config)
