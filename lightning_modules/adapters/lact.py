"""LaCT beside attention, behind a gate: a memory that learns in large chunks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_modules.adapters.base import BaseAttentionAdapter, gated, publish_gates
from lightning_modules.adapters.registry import register_attention_adapter
from lightning_modules.layers.gates import BranchGate
from lightning_modules.layers.lact import FAST, LaCTLayer, LaCTLayerState
from lightning_modules.layers.lact_options import (
    LaCTAttentionConfig,
    LaCTFeatureConfig,
    LaCTLayerConfig,
    LaCTMemoryConfig,
    LaCTUpdateConfig,
)
from lightning_modules.ops import LaCTState
from lightning_modules.streams import FastState


@dataclass(frozen=True)
class LaCTAdapterConfig:
    """The memory, and how its output is gated.

    Args:
        alpha_init: initial alpha of the gate `tanh(alpha)`, one per channel; 0 starts as the base
            model.
        memory: the fast networks.
        features: what they are given.
        update: how they learn.
    """

    alpha_init: float = 0.1
    memory: LaCTMemoryConfig = field(default_factory=LaCTMemoryConfig)
    features: LaCTFeatureConfig = field(default_factory=LaCTFeatureConfig)
    update: LaCTUpdateConfig = field(default_factory=LaCTUpdateConfig)


@register_attention_adapter("lact", LaCTAdapterConfig)
class LaCTAttentionAdapter(BaseAttentionAdapter):
    """`gate_attn * attn + tanh(alpha) * lact(x)`, x the input of attention.

    The branch is a LaCT layer without attention of its own: queries, keys and values are new
    projections of x, whose heads are rotated as wholes.
    Source: Zhang et al., "Test-Time Training Done Right", 2025, arXiv:2505.23884.

    Args:
        base_attention: attention with `config.hidden_size`.
        config: the memory and its gate.
    """

    def __init__(self, base_attention: nn.Module, config: LaCTAdapterConfig) -> None:
        super().__init__(base_attention)
        hidden_size = base_attention.config.hidden_size
        self.adapter_config = config
        heads = LaCTAttentionConfig(num_attn_heads=config.memory.num_lact_heads)
        self.lact = LaCTLayer(
            LaCTLayerConfig(
                hidden_size,
                heads,
                config.memory,
                config.features,
                config.update,
                branches="memory",
            )
        )
        self.lact_gate = BranchGate("tanh", hidden_size, alpha_init=config.alpha_init)

    def reset_parameters(self) -> None:
        """Initialise what the adapter adds; the base stays as it is."""
        for module in (*self.lact.modules(), self.lact_gate):
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

    @property
    def carries_state(self) -> bool:
        """It reads a sequence."""
        return True

    def parameter_group(self, name: str) -> str:
        """`gate`, `fast` (learned initial fast weights, how they learn) or `adapter`."""
        if name.startswith("lact_gate."):
            return "gate"
        return "fast" if name.split(".")[1] in FAST else "adapter"

    def merge_obstacle(self) -> str:
        """A memory is no fixed linear map."""
        return (
            "the weights of LaCT depend on the data it has read, so that no fixed weights of the "
            "base compute the same"
        )

    def delta(
        self,
        attn_output: Tensor,
        hidden_states: Tensor,
        *,
        gate_attn: Tensor | None = None,
        residual: Tensor | None = None,
        fast_state: FastState | None = None,
        mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        write_mask: Tensor | None = None,
        write_weight: Tensor | None = None,
        **context: Any,
    ) -> Tensor:
        """`tanh(alpha) * lact(hidden_states)`; see `BaseAttentionAdapter.delta`.

        Args:
            attn_output: `[B, T, hidden]`, before its gate.
            hidden_states: normed input of attention, `[B, T, hidden]`.
            gate_attn: gate of attention.
            residual: residual stream before attention, `[B, T, hidden]`.
            fast_state: handle on the carried state; None starts fresh and keeps nothing.
            mask: as in `LaCTLayer`; so are `document_ids`, `write_mask` and `write_weight`.
            **context: not read.
        """
        state = None
        if fast_state is not None:
            memory = fast_state.read(self.own_slot(), LaCTState)
            state = None if memory is None else LaCTLayerState(None, memory)
        branch, after = self.lact(
            hidden_states,
            mask=mask,
            document_ids=document_ids,
            write_mask=write_mask,
            write_weight=write_weight,
            state=state,
            fast_state=fast_state,
            slot=self.slot,
        )
        gate = self.lact_gate(branch)
        added = gated(branch, gate)
        if fast_state is not None:
            fast_state.write(self.own_slot(), after.memory)
            if fast_state.listens("gate"):
                gates = {"gate_attn": gate_attn, "gate_lact": gate}
                branches = {"attn": gated(attn_output, gate_attn), "lact": added}
                publish_gates(fast_state, self.slot, gates, branches, residual)
        return added
