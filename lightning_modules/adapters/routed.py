"""Several adapters at one attention module, mixed by a gate of every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_modules.adapters.compose import (
    CompositeAdapter,
    MemberSpec,
    added,
    member_specs,
    require_summable,
)
from lightning_modules.adapters.registry import register_attention_adapter
from lightning_modules.layers.router import (
    balance_loss,
    counted_tokens,
    entropy,
    init_router,
    masked_mean,
    router_logits,
    top_k_weights,
    z_loss,
)
from lightning_modules.streams import FastState


@dataclass(frozen=True)
class RoutedConfig:
    """What is mixed, and how.

    Args:
        members: name -> `{adapter_type, adapter_config}`; a `noop` is the choice to add nothing.
        top_k: members of every token, those with the largest probabilities, which are not
            renormalised; None mixes all. The others neither read nor write for that token, but
            they are computed.
        balance_coefficient: weight of the loss that spreads tokens over members, e.g. 0.01; 0 is
            off.
        z_coefficient: weight of the loss that keeps the router's logits small, e.g. 0.001; 0 is
            off.
    """

    members: dict[str, MemberSpec]
    top_k: int | None = None
    balance_coefficient: float = 0.0
    z_coefficient: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", member_specs(self.members))
        n = len(self.members)
        if self.top_k is not None and not 1 <= self.top_k <= n:
            raise ValueError(
                f"top_k={self.top_k}, but there are {n} members ({', '.join(self.members)}): "
                f"choose 1 to {n}, or None to mix all"
            )
        for name in ("balance_coefficient", "z_coefficient"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative; 0 is off")


class Mixture(NamedTuple):
    """What the router says, `[B, T, n]` each; `selected` (bool) is None if all are mixed."""

    logits: Tensor
    probabilities: Tensor
    weights: Tensor
    selected: Tensor | None


@register_attention_adapter("routed", RoutedConfig)
class RoutedAdapter(CompositeAdapter):
    """`gate_attn * attn + sum_i w_i delta_i`, with weights of every token.

    `w = softmax(x W^T + b)` in float32, x the input of attention at the token itself: causal. With
    `top_k` all but the largest become 0. The weight of a member gates what it writes, too: its
    fast weights learn from a token in steps of `w_i` times their size. Losses of the router count
    in training mode, over the tokens of `mask` in rows that have a file.

    Args:
        base_attention: attention with `config.hidden_size`.
        config: what is mixed.

    Raises:
        ValueError: a member that is no sum with attention.
    """

    def __init__(self, base_attention: nn.Module, config: RoutedConfig) -> None:
        super().__init__(base_attention, config)
        require_summable("routed", self.members)
        self.router = nn.Linear(base_attention.config.hidden_size, len(self.members))
        init_router(self.router)

    def reset_parameters(self) -> None:
        """Initialise the members and the router."""
        super().reset_parameters()
        init_router(self.router)

    def parameter_group(self, name: str) -> str:
        """`gate` for the router; see `BaseAttentionAdapter.parameter_group`."""
        return "gate" if name.startswith("router.") else super().parameter_group(name)

    def mix(self, hidden_states: Tensor) -> Mixture:
        """Weights of the members for every token.

        Args:
            hidden_states: normed input of attention, `[B, T, hidden]`.
        """
        logits = router_logits(hidden_states, self.router)
        probabilities = logits.softmax(-1)
        if self.adapter_config.top_k is None:
            return Mixture(logits, probabilities, probabilities, None)
        weights, selected = top_k_weights(probabilities, self.adapter_config.top_k)
        return Mixture(logits, probabilities, weights, selected)

    def delta(
        self,
        attn_output: Tensor,
        hidden_states: Tensor,
        *,
        fast_state: FastState | None = None,
        mask: Tensor | None = None,
        write_weight: Tensor | None = None,
        **context: Any,
    ) -> Tensor | None:
        """`sum_i w_i delta_i`; see `BaseAttentionAdapter.delta`.

        Args:
            attn_output: `[B, T, hidden]`, before its gate.
            hidden_states: normed input of attention, `[B, T, hidden]`.
            fast_state: handle on the carried state; None starts fresh and keeps nothing.
            mask: real tokens, bool `[B, T]`.
            write_weight: `[B, T]`, of a router around this one: multiplies with this one's.
            **context: further keywords of `CONTEXT_KEYS`.
        """
        mixture, total = self.mix(hidden_states), None
        if fast_state is not None:
            self._add_losses(
                fast_state, mixture, counted_tokens(mask, fast_state.live, hidden_states)
            )
            self._publish(fast_state, mixture, mask)
        context |= {"fast_state": fast_state, "mask": mask}
        for member, weight in zip(self.members.values(), mixture.weights.unbind(-1), strict=True):
            writes = weight if write_weight is None else write_weight * weight
            change = member.delta(attn_output, hidden_states, write_weight=writes, **context)
            if change is not None:
                total = added(total, weight.unsqueeze(-1).to(change.dtype) * change)
        return total

    def _add_losses(self, fast_state: FastState, mixture: Mixture, mask: Tensor | None) -> None:
        """Leave the weighted losses for the training step."""
        config = self.adapter_config
        if not self.training:
            return
        if config.balance_coefficient > 0:
            loss = balance_loss(mixture.probabilities, mixture.selected, mask)
            fast_state.add_loss(self.own_slot(), router_balance=config.balance_coefficient * loss)
        if config.z_coefficient > 0:
            loss = z_loss(mixture.logits, mask)
            fast_state.add_loss(self.own_slot(), router_z=config.z_coefficient * loss)

    def _publish(self, fast_state: FastState, mixture: Mixture, mask: Tensor | None) -> None:
        """Of every row: `load [B, n]`, the members' shares, and mean `entropy [B]` in nats."""
        if not fast_state.listens("router"):
            return
        with torch.no_grad():
            probabilities = mixture.probabilities.detach()
            chosen = probabilities if mixture.selected is None else mixture.selected.float()
            load = masked_mean(chosen, mask, dim=1)
            certainty = masked_mean(entropy(probabilities).unsqueeze(-1), mask, dim=1).squeeze(-1)
        share = load / (self.adapter_config.top_k or 1)
        fast_state.publish("router", self.own_slot(), load=share, entropy=certainty)
