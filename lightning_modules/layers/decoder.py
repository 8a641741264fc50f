"""Gemma decoder layer with adaptive norms and gated residuals (the layer of pi0.5's expert)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_modules.layers.adarms import AdaRMSNorm, gated_residual

if TYPE_CHECKING:
    from lightning_modules.streams import FastState


class AdaptiveDecoderLayer(nn.Module):
    """Attention and MLP, each behind an `AdaRMSNorm` whose gate scales it.

    ```
    n1, gate_attn = input_layernorm(x, cond);           x = x + gate_attn * attn(n1)
    n2, gate_mlp  = post_attention_layernorm(x, cond);  x = x + gate_mlp  * mlp(n2)
    ```

    If `self_attn` is an attention adapter, the gate of attention is applied inside it, beside the
    adapter's own: `x + (gate_attn * attn + gate_ttt * ttt)`.

    The forward call reads nothing but its arguments, so that activation checkpointing may be put
    around all of it.

    Args:
        self_attn: Gemma attention, wrapped by an adapter or not.
        mlp: maps `[B, T, hidden]` to the same.
        input_layernorm: norm before attention.
        post_attention_layernorm: norm before the MLP.
    """

    def __init__(
        self,
        self_attn: nn.Module,
        mlp: nn.Module,
        input_layernorm: AdaRMSNorm,
        post_attention_layernorm: AdaRMSNorm,
    ) -> None:
        super().__init__()
        self.self_attn, self.mlp = self_attn, mlp
        self.input_layernorm = input_layernorm
        self.post_attention_layernorm = post_attention_layernorm

    @classmethod
    def from_gemma(cls, layer: nn.Module, cond_size: int | None = None) -> AdaptiveDecoderLayer:
        """A layer that computes what a `GemmaDecoderLayer` does, with its attention and its MLP.

        Args:
            layer: the layer to retrofit; its attention and MLP are taken over, not copied.
            cond_size: size of the condition vector; None keeps the norms plain.
        """
        norms = (
            AdaRMSNorm.retrofit(norm.weight, cond_size, norm.eps).train(norm.training)
            for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        )
        return cls(layer.self_attn, layer.mlp, *norms).train(layer.training)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        adarms_cond: Tensor | None = None,
        segments: Tensor | None = None,
        fast_state: FastState | None = None,
        write_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """One layer.

        Args:
            hidden_states: x, `[B, T, hidden]`.
            position_embeddings: rotary cosines and sines, each `[B, T, head_dim]`.
            attention_mask: what the attention implementation expects: bool (True attends) or
                additive `[B, 1, T, T]` for SDPA, additive for eager.
            adarms_cond: condition of the adaptive norms and gates, `[B, C]`, `[B, T, C]`, or
                `[B, S, C]` with `segments`.
            segments: row of `adarms_cond` that each token uses, int64 `[T]`.
            fast_state: handle on the state of the adapters with fast weights.
            write_mask: tokens that may write fast weights, bool `[B, T]`.
            **kwargs: whatever else attention takes (`past_key_values`, ...).

        Returns:
            `[B, T, hidden]`.
        """
        attention = {
            "position_embeddings": position_embeddings,
            "attention_mask": attention_mask,
            **kwargs,
        }
        x = hidden_states
        normed, gate = self._norm(self.input_layernorm, x, adarms_cond, segments)
        if getattr(self.self_attn, "applies_gates", False):
            branch, *_ = self.self_attn(
                hidden_states=normed,
                residual=x,
                gate_attn=gate,
                adarms_cond=adarms_cond,
                segments=segments,
                fast_state=fast_state,
                write_mask=write_mask,
                **attention,
            )
            x = x + branch
        else:
            branch, *_ = self.self_attn(hidden_states=normed, **attention)
            x = gated_residual(x, branch, gate)
        normed, gate = self._norm(self.post_attention_layernorm, x, adarms_cond, segments)
        return gated_residual(x, self.mlp(normed), gate)

    @staticmethod
    def _norm(
        norm: AdaRMSNorm, x: Tensor, cond: Tensor | None, segments: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Plain norms (a layer may have them beside conditional gates) get no condition."""
        return norm(x) if norm.cond_size is None else norm(x, cond, segments)
