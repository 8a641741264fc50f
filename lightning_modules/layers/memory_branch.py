"""What a memory adds to the residual stream of one decoder layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_modules.layers.chapter_router import ChapterRouter, Routing
from lightning_modules.layers.memory_attention import MemoryAttention
from lightning_modules.layers.memory_bank import (
    BankReader,
    MemoryBank,
    QuantizedBank,
    check_chapters,
    make_bank,
)
from lightning_modules.layers.memory_options import BankConfig, MemoryAttentionConfig, RouterConfig
from lightning_modules.layers.pooling import RouterState
from lightning_modules.layers.product_keys import ProductKeyConfig, ProductKeyMemory
from lightning_modules.layers.router import counted_tokens
from lightning_modules.streams import FastState

Constant = Callable[[str, Callable[[], Any]], Any]
"""`constant(name, compute)`: what was computed under this name before, or is computed now."""


@dataclass(frozen=True)
class MemoryConfig:
    """A memory: what is stored, how it is read, and who chooses what is read.

    Args:
        bank: the rows; shared by layers as the model says.
        attention: how they are read.
        router: which chapters a token reads; None reads the whole bank.
        product_keys: a product-key memory instead of bank, attention and router.
        variant: `A` reads between attention and MLP; `B` reads after the MLP, and gives what was
            read an MLP of its own.
    """

    bank: BankConfig = field(default_factory=BankConfig)
    attention: MemoryAttentionConfig = field(default_factory=MemoryAttentionConfig)
    router: RouterConfig | None = field(default_factory=RouterConfig)
    product_keys: ProductKeyConfig | None = None
    variant: Literal["A", "B"] = "A"

    def __post_init__(self) -> None:
        if self.variant not in ("A", "B"):
            raise ValueError(f"memory.variant={self.variant!r}: choose A or B")
        if self.product_keys is None and self.router is not None:
            check_chapters(self.bank.num_rows, self.router.num_chapters)

    def make_bank(self, hidden_size: int) -> MemoryBank:
        """A bank for a model of this width."""
        if self.product_keys is not None:
            return self.product_keys.make_bank(hidden_size)
        return make_bank(self.bank, hidden_size)


class BankMemory(BankReader):
    """Cross-attention to the chapters of a bank that a router chooses.

    Args:
        hidden_size: d of the model.
        config: sizes of reader and router.
        bank: the rows.
    """

    def __init__(self, hidden_size: int, config: MemoryConfig, bank: MemoryBank) -> None:
        super().__init__(bank)
        inner = bank.width if config.bank.kind == "reduced" else hidden_size
        self.attention = MemoryAttention(hidden_size, bank.width, inner, config.attention)
        self.router = None if config.router is None else ChapterRouter(hidden_size, config.router)
        self.router_config = config.router

    @property
    def carries_state(self) -> bool:
        """Whether routing depends on what earlier calls have read."""
        return self.router_config is not None and self.router_config.strategy != "token"

    def reset_parameters(self) -> None:
        """Initialise reader and router; the output is zero."""
        self.attention.reset_parameters()
        if self.router is not None:
            self.router.reset_parameters()

    def forward(
        self,
        x: Tensor,
        fast_state: FastState | None,
        slot: str,
        constant: Constant | None = None,
        **context: Any,
    ) -> Tensor:
        """What is read.

        Args:
            x: normed residual stream, `[B, T, d]`.
            fast_state: handle on the router's state; None starts fresh and keeps nothing.
            slot: name of the layer in it.
            constant: keeps keys and values of the bank between calls; None projects it anew.
            **context: `mask`, `document_ids`, `document_alignment` and `prompt_mask`, as
                `ChapterRouter` takes them.

        Returns:
            `[B, T, d]`.
        """
        routing = None
        if self.router is not None:
            state = None if fast_state is None else fast_state.read(slot, RouterState)
            routing = self.router(x, state=state, **context)
            if fast_state is not None:
                self._leave(
                    fast_state,
                    slot,
                    routing,
                    counted_tokens(context.get("mask"), fast_state.live, x),
                )
        projected = None
        if constant is not None and not isinstance(self.bank, QuantizedBank):
            chapters = 1 if self.router_config is None else self.router_config.num_chapters
            projected = constant(slot, lambda: self.attention.project_bank(self.bank, chapters))
        return self.attention(x, self.bank, routing, self.router_config, projected=projected)

    def _leave(
        self, fast_state: FastState, slot: str, routing: Routing, mask: Tensor | None
    ) -> None:
        """State for the next call, losses for the training step, statistics for a monitor."""
        if routing.state is not None:
            fast_state.write(slot, routing.state)
        if self.training and torch.is_grad_enabled():
            fast_state.add_loss(slot, **routing.losses(self.router_config, mask))
        if fast_state.listens("chapter_router"):
            fast_state.publish("chapter_router", slot, **routing.statistics(mask))


class MemoryBranch(nn.Module):
    """`x -> x + memory(norm(x))`, and in variant B then `x -> x + mlp(mlp_norm(x))`.

    Both add nothing at first: the output of the memory and that of the MLP are zero.

    Args:
        hidden_size: d of the model.
        config: of the memory.
        bank: the rows.
        eps: of the norms.
        mlp: of variant B, `[..., d]` to `[..., d]`, with a last linear map `down_proj`.
    """

    def __init__(
        self,
        hidden_size: int,
        config: MemoryConfig,
        bank: MemoryBank,
        eps: float = 1e-6,
        mlp: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=eps)
        self.reader: BankMemory | ProductKeyMemory
        if config.product_keys is not None:
            self.reader = ProductKeyMemory(hidden_size, config.product_keys, bank)
        else:
            self.reader = BankMemory(hidden_size, config, bank)
        self.mlp = mlp
        self.mlp_norm = None if mlp is None else nn.RMSNorm(hidden_size, eps=eps)
        if mlp is not None:
            nn.init.zeros_(mlp.down_proj.weight)

    @property
    def carries_state(self) -> bool:
        """Whether the output depends on what earlier calls have read, beyond attention's keys."""
        return isinstance(self.reader, BankMemory) and self.reader.carries_state

    def forward(
        self,
        x: Tensor,
        fast_state: FastState | None = None,
        slot: str = "",
        constant: Constant | None = None,
        **context: Any,
    ) -> Tensor:
        """The residual stream with what was read; arguments as `BankMemory.forward`."""
        normed = self.norm(x)
        if isinstance(self.reader, BankMemory):
            x = x + self.reader(normed, fast_state, slot, constant, **context)
        else:
            x = x + self.reader(normed)
        return x if self.mlp is None else x + self.mlp(self.mlp_norm(x))
