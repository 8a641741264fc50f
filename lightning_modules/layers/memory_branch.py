"""What a memory adds to the residual stream of one decoder layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_modules.layers.chapter_router import ChapterRouter, RouterState
from lightning_modules.layers.memory_attention import MemoryAttention
from lightning_modules.layers.memory_bank import MemoryBank, QuantizedBank, check_chapters
from lightning_modules.layers.memory_options import BankConfig, MemoryAttentionConfig, RouterConfig
from lightning_modules.layers.product_keys import ProductKeyConfig, ProductKeyMemory
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


class BankMemory(nn.Module):
    """Cross-attention to the chapters of a bank that a router chooses.

    Args:
        hidden_size: d of the model.
        config: sizes of reader and router.
        bank: the rows, a submodule of the model, not of this one: several layers may share it.
    """

    def __init__(self, hidden_size: int, config: MemoryConfig, bank: MemoryBank) -> None:
        super().__init__()
        inner = bank.width if config.bank.kind == "reduced" else hidden_size
        self.attention = MemoryAttention(hidden_size, bank.width, inner, config.attention)
        self.router = None if config.router is None else ChapterRouter(hidden_size, config.router)
        self.router_config = config.router
        self.bank = bank

    @property
    def bank(self) -> MemoryBank:
        """The rows that are read."""
        return self._bank[0]

    @bank.setter
    def bank(self, bank: MemoryBank) -> None:
        # In a tuple it is no submodule, and its parameters have one name in the model.
        self._bank = (bank,)

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
                self._leave(fast_state, slot, routing)
        projected = None
        if constant is not None and not isinstance(self.bank, QuantizedBank):
            chapters = 1 if self.router_config is None else self.router_config.num_chapters
            projected = constant(slot, lambda: self.attention.project_bank(self.bank, chapters))
        return self.attention(x, self.bank, routing, self.router_config, projected=projected)

    def _leave(self, fast_state: FastState, slot: str, routing: Any) -> None:
        """State for the next call, losses for the training step, statistics for a monitor."""
        if routing.state is not None:
            fast_state.write(slot, routing.state)
        if self.training and torch.is_grad_enabled():
            losses = routing.losses(self.router_config, live=fast_state.live)
            fast_state.add_loss(slot, **losses)
        if fast_state.listens("chapter_router"):
            fast_state.publish("chapter_router", slot, **routing.statistics(live=fast_state.live))


class MemoryBranch(nn.Module):
    """`x -> x + memory(norm(x))`, and in variant B then `x -> x + mlp(mlp_norm(x))`.

    Both add nothing at first: the output of the memory and that of the MLP are zero.

    Args:
        hidden_size: d of the model.
        config: of the memory.
        bank: the rows; None for product keys.
        eps: of the norms.
        mlp: of variant B, `[..., d]` to `[..., d]`, with a last linear map `down_proj`.
    """

    def __init__(
        self,
        hidden_size: int,
        config: MemoryConfig,
        bank: MemoryBank | None,
        eps: float = 1e-6,
        mlp: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=eps)
        self.reader: BankMemory | ProductKeyMemory
        if config.product_keys is not None:
            self.reader = ProductKeyMemory(hidden_size, config.product_keys)
        else:
            assert bank is not None
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
