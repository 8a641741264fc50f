"""A low-rank branch beside attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_modules.adapters.base import BaseAttentionAdapter
from lightning_modules.adapters.registry import register_attention_adapter


@dataclass(frozen=True)
class LoRAAdapterConfig:
    """Size and strength of the branch.

    Args:
        rank: r, width of the bottleneck.
        alpha: the branch is scaled by `alpha / rank`.
        dropout: probability with which an input of the branch is zeroed in training.
        use_rslora: scale by `alpha / sqrt(rank)` instead, which keeps large ranks learning
            (arXiv:2312.03732).
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1")
        if self.alpha <= 0:
            raise ValueError(f"alpha={self.alpha} must be positive")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")

    @property
    def scaling(self) -> float:
        """Factor of the branch."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@register_attention_adapter("lora", LoRAAdapterConfig)
class LoRAAttentionAdapter(BaseAttentionAdapter):
    """`gate_attn * attn + scaling * B A dropout(x)`, x the input of attention (arXiv:2106.09685).

    A is `[r, hidden]`, B is `[hidden, r]` and zero at initialisation: the start is the base model.
    The branch runs beside the whole of attention; low-rank updates of the projections inside it
    (`q_proj`, ...) are the peft library's.

    Args:
        base_attention: attention with `config.hidden_size`.
        config: size and strength.
    """

    def __init__(self, base_attention: nn.Module, config: LoRAAdapterConfig) -> None:
        super().__init__(base_attention)
        hidden_size = base_attention.config.hidden_size
        self.adapter_config = config
        self.dropout = nn.Dropout(config.dropout)
        self.lora_A = nn.Linear(hidden_size, config.rank, bias=False)
        self.lora_B = nn.Linear(config.rank, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A uniform in `+-1/sqrt(hidden)`, as peft has it; B zero."""
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def delta(self, attn_output: Tensor, hidden_states: Tensor, **context: Any) -> Tensor:
        """`scaling * B A dropout(x)`, `[B, T, hidden]`; see `BaseAttentionAdapter.delta`."""
        return self.lora_B(self.lora_A(self.dropout(hidden_states))) * self.adapter_config.scaling

    def merge_obstacle(self) -> str:
        """The branch has an input that no weight of the base multiplies alone."""
        return (
            "its branch reads the input of attention, but what attention adds to the residual "
            "stream comes out of o_proj, whose input is another; for an update that merges, put "
            "peft's LoRA on the projections"
        )
