"""The `pi0` backbone: test-time training inside transformers' official PI0.

A vision-language model reads images and instruction (the prefix); a smaller Gemma, the action
expert (`dit`), reads one state token and the noisy actions (the suffix) and attends to the
prefix's keys and values layer by layer. Adapters and pi0.5's timestep modulation go into the
expert; the prefix depends neither on noise nor on time and is computed once per chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PI0Config, PI0ForConditionalGeneration

from lightning_modules.adapters import BaseAttentionAdapter
from lightning_modules.adapters.fingerprint import fingerprint
from lightning_modules.layers.adarms import AdaRMSNorm
from lightning_modules.layers.decoder import AdaptiveDecoderLayer
from lightning_modules.layers.time_embedding import TimeMLP
from lightning_modules.models.backbone import (
    STATE,
    Backbone,
    Writers,
    action_tokens,
    exact_frequencies,
    with_unseen_observation,
    write_mask,
)
from lightning_modules.models.pi0_cache import PrefixCache, PrefixRecorder
from lightning_modules.models.pi0_inputs import PI0Inputs, load_processor
from lightning_modules.models.pi0_options import PI0Options
from lightning_modules.models.projection_lora import inject_lora
from lightning_modules.streams import FastState

STATE_TOKENS = 1
"""The official model's attention mask has one block for exactly one state token."""


class Prefix(NamedTuple):
    """What the expert reads of an observation.

    Attributes:
        state: normalised and padded state, `[B, max_state_dim]`.
        cache: keys and values of images and instruction; reading does not change it.
        attention_mask: 1 where the prefix is not padding, `[B, L]`.
    """

    state: Tensor
    cache: PrefixCache
    attention_mask: Tensor


class RecomputedDecoderLayer(AdaptiveDecoderLayer):
    """`AdaptiveDecoderLayer` that is recomputed in backward.

    Safe around attention because a `PrefixCache` does not change when it is read; transformers'
    own checkpointing drops the cache.
    """

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """As `AdaptiveDecoderLayer.forward`."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(hidden_states, **kwargs)
        return checkpoint(super().forward, hidden_states, use_reentrant=False, **kwargs)


class PI0Expert(Backbone):
    """transformers' `PI0ForConditionalGeneration` as a backbone.

    With `adarms` every norm of the expert becomes adaptive, starting as it was. The condition is
    computed beside the action embedding, so anew for every noise level; the state token gets
    condition 0, so that what it writes depends on neither noise nor time.

    Args:
        options: which model, and what is trained.
        features: `state_dim`, `action_dim`, `image_keys`, `tasks` of the data.

    Raises:
        ValueError: the weights are incomplete, or there is no tokenizer.
    """

    def __init__(self, options: PI0Options, features: Mapping[str, Any]) -> None:
        super().__init__()
        self.options = options
        config = options.read_config()
        processor = load_processor(options, config)
        vocab_size = config.vlm_config.text_config.vocab_size
        self.inputs = PI0Inputs(processor, vocab_size, features["image_keys"], features["tasks"])
        self.pi0 = load_model(options, config)
        self.action_size = config.max_action_dim
        self.state_size = config.max_state_dim
        self.norm: AdaRMSNorm | None = None
        self.time_mlp: TimeMLP | None = None
        self._base = self._modify(config)
        self._left_out: frozenset[str] = frozenset()
        self._hash: str | None = None

    def _modify(self, config: PI0Config) -> frozenset[int]:
        """Change the loaded model; returns the ids of the parameters that it brought along."""
        dit, vlm = self.decoder, self.pi0.model.vlm
        dit.embed_tokens = None  # never read: the suffix comes as embeddings
        layer_class = AdaptiveDecoderLayer
        if self.options.gradient_checkpointing:
            layer_class = RecomputedDecoderLayer
            _recompute(vlm)
        width = config.dit_config.hidden_size
        cond_size = width if self.options.adarms else None
        dit.layers = nn.ModuleList(layer_class.from_gemma(x, cond_size) for x in dit.layers)
        if self.options.adarms:
            self.norm = AdaRMSNorm.retrofit(dit.norm.weight, width, dit.norm.eps)
            self.time_mlp = TimeMLP(width, config.min_period, config.max_period)
            dit.norm = nn.Identity()  # its place is behind the expert, where the condition is
        base = {id(p) for name, p in self.pi0.named_parameters() if ".dense." not in name}
        if self.options.train == "lora":
            inject_lora(dit, self.options.lora)
        if self.options.vlm_dtype == "bfloat16":
            with exact_frequencies(vlm):
                vlm.to(torch.bfloat16)
        return frozenset(base)

    @property
    def decoder(self) -> nn.Module:
        """The action expert, a Gemma."""
        return self.pi0.model.dit

    @property
    def cond_size(self) -> int | None:
        """Size of the timestep condition; None without `adarms`."""
        return None if self.time_mlp is None else self.time_mlp.width

    def observe(self, observation: Mapping[str, Any]) -> Prefix:
        """Run the vision-language model over images and instruction.

        Args:
            observation: as `PI0Inputs.forward`, with `observation.state [B, S]`, normalised.
        """
        state = observation[STATE]
        inputs = self.inputs(observation, len(state))
        mask = inputs.attention_mask
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.options.train == "all"):
            embeds = self.pi0.model.embed_prefix(
                inputs.input_ids, inputs.pixel_values, inputs.pixel_attention_mask
            )
            recorder = PrefixRecorder()
            self.pi0.model.vlm(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=mask.cumsum(-1) - 1,
                token_type_ids=torch.zeros_like(mask),  # one bidirectional block
                past_key_values=recorder,
                use_cache=True,
            )
        state = F.pad(state, (0, self.state_size - state.shape[1]))
        return Prefix(state, recorder.prefix(), mask)

    def forward(
        self,
        prefix: Prefix,
        noisy_actions: Tensor,
        time: Tensor,
        *,
        fast_state: FastState | None = None,
        write: Writers = "all",
    ) -> Tensor:
        """Velocity of every action, padded dimensions included; see `Backbone.forward`."""
        suffix = self.pi0.embed_action_time(prefix.state, noisy_actions, time)
        batch, length, _ = suffix.shape
        is_action = action_tokens(length, STATE_TOKENS, suffix.device)
        if fast_state is not None and fast_state.listens("gate"):
            fast_state.publish("gate", "model", time=time)
        context: dict[str, Any] = {
            "fast_state": fast_state,
            "write_mask": write_mask(is_action, write, batch),
        }
        if self.time_mlp is not None:
            condition = self.time_mlp(time).to(suffix.dtype)
            context["adarms_cond"] = with_unseen_observation(condition)
            context["segments"] = is_action.long()
        hidden = self.pi0.model(
            action_embeds=suffix,
            attention_mask=prefix.attention_mask,
            past_key_values=prefix.cache,
            **context,
        ).last_hidden_state
        if self.norm is not None:
            hidden, _ = self.norm(hidden, context["adarms_cond"], context["segments"])
        return self.pi0.action_out_proj(hidden[:, STATE_TOKENS:])

    def complete(self) -> None:
        """Freeze what `train` leaves alone, and whatever can never get a gradient."""
        unread = _unread_parameters(self.pi0)
        left_out = set()
        for name, parameter in self.named_parameters():
            is_base = id(parameter) in self._base
            parameter.requires_grad_(
                not is_base or (self._trains(name) and id(parameter) not in unread)
            )
            if is_base and not parameter.requires_grad and self.options.pretrained is not None:
                left_out.add(name)
        self._left_out = frozenset(left_out)
        self.train(self.training)

    def _trains(self, name: str) -> bool:
        """Whether `train` trains a parameter of the pretrained model."""
        return {"all": True, "expert": ".vlm." not in name}.get(self.options.train, False)

    def train(self, mode: bool = True) -> PI0Expert:
        """Training mode; a frozen vision-language model stays in evaluation mode."""
        super().train(mode)
        if self.options.train != "all":
            self.pi0.model.vlm.eval()
        return self

    def restorable(self) -> frozenset[str]:
        """Frozen parameters of `pretrained`."""
        return self._left_out

    def fingerprint(self) -> str | None:
        """Hash of names, shapes and some values, spread out, of the frozen parameters."""
        if self._hash is None and self._left_out:
            frozen = ((n, p) for n, p in self.named_parameters() if n in self._left_out)
            self._hash = fingerprint(frozen)
        return self._hash


def load_model(options: PI0Options, config: PI0Config) -> PI0ForConditionalGeneration:
    """The official model, with the weights of `pretrained` or random ones.

    Raises:
        ValueError: the file lacks weights, or has others than the model.
    """
    if options.pretrained is None:
        return PI0ForConditionalGeneration(config)
    try:
        model, report = PI0ForConditionalGeneration.from_pretrained(
            options.pretrained, config=config, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"the weights of pi0.pretrained={options.pretrained!r} cannot be loaded: {error}"
        ) from error
    missing = {key for key in report["missing_keys"] if not key.startswith("model.dit.embed")}
    if missing:
        raise ValueError(
            f"pi0.pretrained={options.pretrained!r} lacks {len(missing)} of the model's weights, "
            f"e.g. {min(missing)}: give a complete pi0 model"
        )
    return model


def _recompute(vlm: nn.Module) -> None:
    """Let transformers checkpoint the layers of the vision-language model, cache and all.

    It drops the cache where it could be written twice; a `PrefixRecorder` cannot be.
    """
    for layer in (*vlm.vision_tower.encoder.layers, *vlm.language_model.layers):
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        layer._can_checkpoint_with_cache = True


def _unread_parameters(pi0: PI0ForConditionalGeneration) -> set[int]:
    """Parameters on which no action depends; DistributedDataParallel would wait for them.

    Of the vision-language model's last layer only keys and values are read.
    """
    vlm, dit = pi0.model.vlm, pi0.model.dit
    last = vlm.language_model.layers[-1]
    modules = [
        last.self_attn.q_proj,
        last.self_attn.o_proj,
        last.post_attention_layernorm,
        last.mlp,
        vlm.language_model.norm,
        getattr(vlm.vision_tower, "head", None),
    ]
    modules += [
        layer.self_attn.base_attention
        for layer in dit.layers
        if isinstance(layer.self_attn, BaseAttentionAdapter) and layer.self_attn.replaces_attention
    ]
    return {id(p) for module in modules if module is not None for p in module.parameters()}
