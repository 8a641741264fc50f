"""Action expert: a Gemma transformer that denoises a chunk of actions by flow matching.

The `state` backbone of the TTT-gated action expert (pi0 / pi0.5 without the vision-language
model): observation tokens and action tokens go through Gemma decoder layers together.

Tokens: `observation_tokens` of the state, then one per action of the chunk. Observation tokens
attend to observation tokens only and never see the timestep (condition 0, that is the bias of
every adaptive norm alone); action tokens attend to everything. What observation tokens write
into fast weights therefore depends neither on the noise nor on the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GemmaConfig
from transformers.models.gemma.modeling_gemma import (
    GemmaAttention,
    GemmaMLP,
    GemmaRotaryEmbedding,
)

from lightning_modules.layers.adarms import AdaRMSNorm
from lightning_modules.layers.decoder import AdaptiveDecoderLayer
from lightning_modules.layers.time_embedding import ActionTimeEmbedding, TimeMLP
from lightning_modules.models.backbone import (
    STATE,
    Backbone,
    Writers,
    action_tokens,
    with_unseen_observation,
    write_mask,
)
from lightning_modules.streams import FastState


@dataclass(frozen=True)
class ExpertConfig:
    """Size of the expert.

    Args:
        hidden_size: width of the residual stream.
        num_layers: decoder layers.
        num_heads: attention heads; `num_kv_heads` of them have keys and values of their own.
        num_kv_heads: key/value heads (1: multi-query, as in pi0).
        head_dim: size of an attention head.
        intermediate_size: width of the gated MLP.
        observation_tokens: tokens into which the state vector is projected.
        adarms: True gives pi0.5's timestep modulation of every norm; False mixes the timestep
            into the action tokens as pi0 does.
        gradient_checkpointing: recompute each layer in backward instead of keeping it.
    """

    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 1
    head_dim: int = 32
    intermediate_size: int = 512
    observation_tokens: int = 1
    adarms: bool = True
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, bool) and value < 1:
                raise ValueError(f"expert.{field.name}={value} must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.observation_tokens != 1 and not self.adarms:
            raise ValueError(
                f"observation_tokens={self.observation_tokens} needs adarms=true: pi0's action "
                "embedding has exactly one state token"
            )

    def gemma(self) -> GemmaConfig:
        """Configuration of the attention and MLP modules."""
        return GemmaConfig(
            vocab_size=1,
            bos_token_id=None,
            eos_token_id=None,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate_size,
            attn_implementation="sdpa",
        )

    def check(self, features: Mapping[str, Any]) -> None:
        """Refuse cameras.

        Raises:
            ValueError: the data has them.
        """
        if features["image_keys"]:
            raise ValueError(
                "this expert sees the state vector only; remove "
                f"image_keys={features['image_keys']}, or use backbone: pi0"
            )

    def build(self, features: Mapping[str, Any]) -> ActionExpert:
        """The expert for the data's sizes."""
        return ActionExpert(self, features["state_dim"], features["action_dim"])

    @classmethod
    def restore(cls, stored: Mapping[str, Any]) -> Self:
        """Inverse of `dataclasses.asdict`."""
        return cls(**stored)


class ActionExpert(Backbone):
    """Velocity field `v(x_t, t, state)` of a chunk of actions.

    Args:
        config: its size.
        state_dim: size of the observation vector.
        action_dim: size of one action.
    """

    def __init__(self, config: ExpertConfig, state_dim: int, action_dim: int) -> None:
        super().__init__()
        self.config = config
        self.action_size = action_dim
        width = config.hidden_size
        if config.adarms:
            self.state_proj = nn.Linear(state_dim, config.observation_tokens * width)
            self.action_in_proj = nn.Linear(action_dim, width)
            self.time_mlp = TimeMLP(width)
        else:
            self.action_time = ActionTimeEmbedding(state_dim, action_dim, width)
        self.layers = nn.ModuleList(self._layer(index) for index in range(config.num_layers))
        self.norm = AdaRMSNorm(width, self.cond_size)
        self.action_out_proj = nn.Linear(width, action_dim)
        self.rotary_emb = GemmaRotaryEmbedding(config.gemma())

    @property
    def decoder(self) -> ActionExpert:
        """The expert itself."""
        return self

    @property
    def cond_size(self) -> int | None:
        """Size of the timestep condition; None without adaRMS."""
        return self.config.hidden_size if self.config.adarms else None

    def _layer(self, index: int) -> AdaptiveDecoderLayer:
        gemma = self.config.gemma()
        return AdaptiveDecoderLayer(
            self_attn=GemmaAttention(gemma, layer_idx=index),
            mlp=GemmaMLP(gemma),
            input_layernorm=AdaRMSNorm(self.config.hidden_size, self.cond_size),
            post_attention_layernorm=AdaRMSNorm(self.config.hidden_size, self.cond_size),
        )

    def observe(self, observation: Mapping[str, Any]) -> Tensor:
        """The state vector `[B, S]`; see `Backbone.observe`."""
        return observation[STATE]

    def forward(
        self,
        state: Tensor,
        noisy_actions: Tensor,
        time: Tensor,
        *,
        fast_state: FastState | None = None,
        write: Writers = "all",
    ) -> Tensor:
        """Velocity of every action.

        Args:
            state: normalised observation, `[B, S]`.
            noisy_actions: x_t, `[B, A, D]`.
            time: flow-matching time in [0, 1], 1 is noise, `[B]`.
            fast_state: handle on the fast state; None starts afresh and keeps nothing.
            write: which tokens update the fast weights.

        Returns:
            `[B, A, D]`.
        """
        hidden, condition = self._embed(state, noisy_actions, time)
        batch, length, _ = hidden.shape
        observed = self.config.observation_tokens
        is_action = action_tokens(length, observed, hidden.device)
        if fast_state is not None and fast_state.listens("gate"):
            fast_state.publish("gate", "model", time=time)
        context = {
            "position_embeddings": self.rotary_emb(
                hidden, torch.arange(length, device=hidden.device)[None]
            ),
            "attention_mask": _observation_first_mask(is_action, hidden.dtype),
            "adarms_cond": condition,
            "segments": None if condition is None else is_action.long(),
            "fast_state": fast_state,
            "write_mask": write_mask(is_action, write, batch),
        }
        for layer in self.layers:
            if self.config.gradient_checkpointing and self.training:
                hidden = checkpoint(layer, hidden, use_reentrant=False, **context)
            else:
                hidden = layer(hidden, **context)
        condition = None if condition is None else condition[:, 1]
        normed, _ = self.norm(hidden[:, observed:], condition)
        return self.action_out_proj(normed)

    def _embed(
        self, state: Tensor, noisy_actions: Tensor, time: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens `[B, T, hidden]` and the condition of observation and actions `[B, 2, C]`."""
        if not self.config.adarms:
            return self.action_time(state, noisy_actions, time), None
        batch = state.shape[0]
        observation = self.state_proj(state).view(batch, self.config.observation_tokens, -1)
        tokens = torch.cat([observation, self.action_in_proj(noisy_actions)], dim=1)
        condition = self.time_mlp(time).to(tokens.dtype)
        return tokens, with_unseen_observation(condition)


def _observation_first_mask(is_action: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask `[1, 1, T, T]`: observation tokens see observation, action tokens all."""
    hidden = is_action[None, :] & ~is_action[:, None]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=is_action.device)
    return mask.masked_fill(hidden, torch.finfo(dtype).min)[None, None]
