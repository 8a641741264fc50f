"""TTT beside attention, behind a gate: the adapter of the action expert."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor, nn

from lightning_modules.adapters.base import BaseAttentionAdapter, gated, publish_gates
from lightning_modules.adapters.registry import register_attention_adapter
from lightning_modules.layers.adarms import AdaRMSNorm
from lightning_modules.layers.gates import BranchGate, GateKind
from lightning_modules.layers.ttt import TTTConfig, TTTLayer
from lightning_modules.streams import FastState

TTTMode = Literal["after_attn", "after_residual", "parallel_attn", "replace_attn"]
InputNorm = Literal["adarms", "rms", "none"]
FAST = ("W1", "b1", "W2", "b2", "learnable_ttt_lr_weight", "learnable_ttt_lr_bias")
"""Parameters of a `TTTLayer` that are fast weights at the start of a stream, or their steps."""


@dataclass(frozen=True)
class TTTAdapterConfig:
    """Where the TTT layer reads, and how its output is gated.

    Args:
        ttt_mode: what TTT reads. `after_attn`: the attention output, before its gate;
            `after_residual`: the residual stream after gated attention; `parallel_attn`: the
            normed input of attention; `replace_attn`: the same, and attention is left out.
        ttt_gate: `none` (1), `tanh` (static, `tanh(alpha)` per channel), `adarms` (from the
            condition, 0 at initialisation), `adarms_tanh` (the product).
        alpha_init: initial alpha of the static gate; 0 starts as the base model.
        ttt_input_norm: norm of what TTT reads; `adarms` needs the condition.
        cond_size: size of the condition vector, where gate or norm need one; the action expert
            fills it in.
        layer: the TTT layer.
    """

    ttt_mode: TTTMode = "after_attn"
    ttt_gate: GateKind = "tanh"
    alpha_init: float = 0.1
    ttt_input_norm: InputNorm = "rms"
    cond_size: int | None = None
    layer: TTTConfig = field(default_factory=TTTConfig)

    def __post_init__(self) -> None:
        choices = {"ttt_mode": TTTMode, "ttt_gate": GateKind, "ttt_input_norm": InputNorm}
        for name, literal in choices.items():
            value = getattr(self, name)
            if value not in get_args(literal):
                raise ValueError(f"{name}={value!r}: choose one of {', '.join(get_args(literal))}")

    @property
    def needs_condition(self) -> bool:
        """Whether the gate or the norm reads the condition."""
        return "adarms" in self.ttt_gate or self.ttt_input_norm == "adarms"


@register_attention_adapter("ttt", TTTAdapterConfig)
class TTTAttentionAdapter(BaseAttentionAdapter):
    """`gate_attn * attn + gate_ttt * ttt(norm(source))`.

    The gate `adarms` is the third chunk of the adaptive input norm's modulation; with another
    input norm it is a linear map of the condition of its own.

    Attributes:
        layer_class: the TTT layer; a subclass with another inner loss names its own.

    Args:
        base_attention: attention with `config.hidden_size`.
        config: where TTT reads and how it is gated.

    Raises:
        ValueError: a gate or norm that needs the condition, without `cond_size`.
    """

    layer_class: ClassVar[type[TTTLayer]] = TTTLayer

    def __init__(self, base_attention: nn.Module, config: TTTAdapterConfig) -> None:
        super().__init__(base_attention)
        if config.needs_condition and config.cond_size is None:
            raise ValueError(
                f"ttt_gate={config.ttt_gate!r} with ttt_input_norm={config.ttt_input_norm!r} needs "
                "cond_size, the size of the condition vector (adarms_cond); an expert without "
                "adarms has none"
            )
        hidden_size = base_attention.config.hidden_size
        self.adapter_config = config
        norm_cond = config.cond_size if config.ttt_input_norm == "adarms" else None
        gate_cond = config.cond_size if config.ttt_input_norm != "adarms" else None
        self.ttt_input_norm = (
            None if config.ttt_input_norm == "none" else AdaRMSNorm(hidden_size, norm_cond)
        )
        self.ttt = self.layer_class(hidden_size, config.layer)
        self.ttt_gate = BranchGate(config.ttt_gate, hidden_size, gate_cond, config.alpha_init)

    def reset_parameters(self) -> None:
        """Initialise what the adapter adds; the base stays as it is."""
        for module in (self.ttt_input_norm, self.ttt, self.ttt_gate):
            if module is not None:
                module.reset_parameters()

    @property
    def carries_state(self) -> bool:
        """Whether TTT reads a sequence; without `causal` the call is the unit."""
        return self.adapter_config.layer.causal

    @property
    def replaces_attention(self) -> bool:
        """Whether attention is left out."""
        return self.adapter_config.ttt_mode == "replace_attn"

    def parameter_group(self, name: str) -> str:
        """`gate`, `fast` (learned initial fast weights, their step sizes) or `adapter`."""
        if name.startswith("ttt_gate."):
            return "gate"
        return "fast" if name.rsplit(".", 1)[-1] in FAST else "adapter"

    def merge_obstacle(self) -> str:
        """TTT is no fixed linear map."""
        return (
            "the weights of TTT depend on the data it has read, so that no fixed weights of the "
            "base compute the same"
        )

    def adapt(
        self,
        attn_output: Tensor | None,
        hidden_states: Tensor,
        *,
        gate_attn: Tensor | None = None,
        **context: Any,
    ) -> Tensor:
        """Complete attention output; see `BaseAttentionAdapter.adapt`.

        Args:
            attn_output: `[B, T, hidden]`, before its gate; not read by `replace_attn`.
            hidden_states: normed input of attention, `[B, T, hidden]`.
            gate_attn: gate of attention.
            **context: as in `delta`.
        """
        if self.replaces_attention:
            return self.delta(None, hidden_states, **context)
        return super().adapt(attn_output, hidden_states, gate_attn=gate_attn, **context)

    def delta(
        self,
        attn_output: Tensor | None,
        hidden_states: Tensor,
        *,
        adarms_cond: Tensor | None = None,
        gate_attn: Tensor | None = None,
        segments: Tensor | None = None,
        residual: Tensor | None = None,
        fast_state: FastState | None = None,
        **tokens: Tensor | None,
    ) -> Tensor:
        """`gate_ttt * ttt(norm(source))`; see `BaseAttentionAdapter.delta`.

        Args:
            attn_output: `[B, T, hidden]`, before its gate; None if attention is replaced.
            hidden_states: normed input of attention, `[B, T, hidden]`.
            adarms_cond: condition, as in `AdaptiveDecoderLayer`.
            gate_attn: gate of attention.
            segments: as in `AdaptiveDecoderLayer`.
            residual: residual stream before attention, `[B, T, hidden]`.
            fast_state: handle on the carried state; None starts fresh and keeps nothing.
            **tokens: `mask`, `write_mask`, `write_weight` and `document_ids`, as in `TTTLayer`.
        """
        attention = None if attn_output is None else gated(attn_output, gate_attn)
        source = self._source(attn_output, attention, hidden_states, residual)
        normed, norm_gate = self._normed(source, adarms_cond, segments)
        branch = self._learn(normed, fast_state, tokens)
        gate = self.ttt_gate(branch, adarms_cond, segments, norm_gate)
        added = gated(branch, gate)
        if fast_state is not None and fast_state.listens("gate"):
            gates = {"gate_attn": gate_attn, "gate_ttt": gate, "alpha": self.ttt_gate.static()}
            branches = {"attn": attention, "ttt": added}
            publish_gates(fast_state, self.slot, gates, branches, residual)
        return added

    def _source(
        self,
        attn_output: Tensor | None,
        attention: Tensor | None,
        hidden_states: Tensor,
        residual: Tensor | None,
    ) -> Tensor:
        """What TTT reads in this mode, `[B, T, hidden]`."""
        mode = self.adapter_config.ttt_mode
        if mode == "after_attn":
            return attn_output
        if mode == "after_residual":
            if residual is None:
                raise ValueError(
                    "ttt_mode='after_residual' reads the residual stream: the decoder layer must "
                    "pass residual= (AdaptiveDecoderLayer does), or choose 'after_attn'"
                )
            return residual + attention
        return hidden_states

    def _normed(
        self, source: Tensor, cond: Tensor | None, segments: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Input of the TTT layer, and the gate of the adaptive norm."""
        if self.ttt_input_norm is None:
            return source, None
        if self.ttt_input_norm.cond_size is None:
            return self.ttt_input_norm(source)
        return self.ttt_input_norm(source, cond, segments)

    def _learn(
        self, x: Tensor, fast_state: FastState | None, tokens: dict[str, Tensor | None]
    ) -> Tensor:
        """TTT, from the carried state to the next one."""
        if fast_state is None:
            return self.ttt(x, **tokens)[0]
        slot = self.own_slot()
        state = fast_state.read(slot, self.ttt.state_class)
        out, state = self.ttt(x, state=state, fast_state=fast_state, slot=slot, **tokens)
        fast_state.write(slot, state)
        return out
