"""LaCT language models in the Hugging Face style: `LaCTModel` and `LaCTForCausalLM`.

Blocks are `x + LaCT(RMSNorm x)`, then `x + SwiGLU(RMSNorm x)`. Whatever a layer carries, its
memory and the window of its attention, is a value in a `FastState`: handed in as `fast_state=`
where a sequence comes as a stream of chunks, or kept by a `FastStateCache` in `generate()`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from lightning_modules.generation import FastStateCache, state_of
from lightning_modules.layers.lact import (
    FastNetworks,
    LaCTLayer,
    LaCTLayerState,
    LowRankFastWeight,
)
from lightning_modules.layers.shared_window import SharedWindow
from lightning_modules.layers.window_attention import WindowPlan, WindowState
from lightning_modules.models.lact_config import LaCTConfig
from lightning_modules.ops.states import LaCTState
from lightning_modules.streams import FastState


class LaCTMLP(nn.Module):
    """`W_down (silu(W_gate x) * (W_up x))`."""

    def __init__(self, config: LaCTConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.down_proj = nn.Linear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, hidden]` to `[B, T, hidden]`."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LaCTBlock(GradientCheckpointingLayer):
    """A LaCT layer and an MLP, each behind an RMSNorm and a skip connection.

    Args:
        config: of the model.
        layer_idx: number of the block.
    """

    def __init__(self, config: LaCTConfig, layer_idx: int) -> None:
        super().__init__()
        self.slot = f"layers.{layer_idx}.attn"
        self.attn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = LaCTLayer(config.layer)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = LaCTMLP(config)

    def state(self, fast_state: FastState) -> LaCTLayerState | None:
        """What the layer carries into this call; None: nothing yet."""
        window = fast_state.read(f"{self.slot}.window", WindowState)
        memory = fast_state.read(self.slot, LaCTState)
        return None if window is None and memory is None else LaCTLayerState(window, memory)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        fast_state: FastState,
        plan: WindowPlan | SharedWindow | None,
        mask: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        """Read a call `[B, T, hidden]`, and leave the next state in `fast_state`."""
        attended, (window, memory) = self.attn(
            self.attn_norm(hidden_states),
            mask=mask,
            document_ids=document_ids,
            state=self.state(fast_state),
            plan=plan,
            fast_state=fast_state,
            slot=self.slot,
        )
        if window is not None:
            fast_state.write(f"{self.slot}.window", window)
        if memory is not None:
            fast_state.write(self.slot, memory)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class LaCTPreTrainedModel(PreTrainedModel):
    """What LaCT models share: configuration, initialisation, checkpointing of blocks."""

    config_class = LaCTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["LaCTBlock"]
    _supports_sdpa = True
    _is_stateful = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (FastNetworks, LowRankFastWeight)):
            module.reset_parameters()


class LaCTModel(LaCTPreTrainedModel):
    """Embedding, blocks and a final RMSNorm.

    Args:
        config: size and options.
    """

    def __init__(self, config: LaCTConfig) -> None:
        super().__init__(config)
        # Without padding_idx: where padding is the end-of-text token, that must be learned.
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        blocks = (LaCTBlock(config, index) for index in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        fast_state: FastState | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Read a call, and learn from its full chunks. Positions are counted, not given.

        Args:
            input_ids: `[B, T]`; or
            inputs_embeds: `[B, T, hidden]`.
            attention_mask: real tokens (1) of this call, or of it and all before, `[B, >= T]`.
            mask: real tokens of this call, bool `[B, T]`. The others write nothing, are not
                attended to, and their output has no meaning.
            document_ids: int64 `[B, T]`; every document starts afresh.
            past_key_values: a `FastStateCache`, from which the state comes and to which it goes.
            use_cache: make such a cache if there is none; None: as the configuration says, not in
                training.
            fast_state: handle of a stream's chunk; wins over the cache. Without either, every
                call starts afresh. Where it has a `group`, the tokens are the own part of rows
                that its processes share.
            output_hidden_states: also return the inputs of all blocks, and the output.

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds, a mask of another shape,
                a cache without fast state or with that of another number of rows.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds, and not both")
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        mask = real_tokens(x, mask, attention_mask)
        cache = self._cache(past_key_values, use_cache, fast_state)
        state = fast_state
        if state is None:
            state = FastState.transient() if cache is None else state_of(cache, len(x))
        carried = self.layers[0].state(state)
        window = None if carried is None else carried.window
        plan = self.layers[0].attn.plan(
            x, mask=mask, document_ids=document_ids, state=window, group=state.group
        )
        keep = output_hidden_states
        if keep is None:
            keep = self.config.output_hidden_states
        hidden_states = []
        for layer in self.layers:
            hidden_states += [x] if keep else []
            x = layer(x, fast_state=state, plan=plan, mask=mask, document_ids=document_ids)
        x = self.norm(x)
        if cache is not None:
            cache.tokens_read += x.shape[1]
            cache.fast_state = cache.fast_state if state is fast_state else state.advance()
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=(*hidden_states, x) if keep else None,
        )

    def _cache(
        self, cache: Any, use_cache: bool | None, fast_state: FastState | None
    ) -> FastStateCache | None:
        """The given cache, checked, or a new one where the call is to leave one."""
        if cache is not None and not isinstance(cache, FastStateCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}, which has no place for fast "
                "weights: pass FastStateCache(model.config) from lightning_modules.generation, or "
                "none (generate() makes one)"
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if cache is None and use_cache and fast_state is None:
            return FastStateCache(self.config)
        return cache


def real_tokens(x: Tensor, mask: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
    """Tokens of the call that both masks know, bool `[B, T]`; None: all.

    Args:
        x: `[B, T, hidden]`.
        mask: bool `[B, T]`, or None.
        attention_mask: 1 for real tokens, of the call and of any number before, `[B, >= T]`.
    """
    if attention_mask is None:
        return mask
    rows, length = x.shape[:2]
    shape = tuple(attention_mask.shape)
    if len(shape) != 2 or shape[0] != rows or shape[1] < length:
        raise ValueError(
            f"attention_mask must have shape [{rows}, {length}] or more columns for what was read "
            f"before, but has {list(shape)}: it marks padding by 0; LaCT has no other masks, but "
            "document_ids keep documents apart"
        )
    real = attention_mask[:, -length:].bool()
    return real if mask is None else real & mask


class LaCTForCausalLM(LaCTPreTrainedModel, GenerationMixin):
    """`LaCTModel` with an output layer.

    `generate()` decodes with a `FastStateCache`, of constant size; give one to continue from it.

    Args:
        config: size and options.
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embeddings.weight"}

    def __init__(self, config: LaCTConfig) -> None:
        super().__init__(config)
        self.model = LaCTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.model.embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        fast_state: FastState | None = None,
        output_hidden_states: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token, and the loss; see `LaCTModel.forward` for the rest.

        Args:
            input_ids: `[B, T]`.
            attention_mask: as there.
            labels: `[B, T]`, -100 where none: token t + 1 is the target of t (Hugging Face's
                convention). A document's first token is no target: it needs -100.
            logits_to_keep: compute the logits of so many last tokens only (0: of all), or of these.
            mask: as there; so are the others.
        """
        if labels is not None and fast_state is not None and fast_state.group is not None:
            raise ValueError(
                "labels are shifted by one token, but the next token of the last one is with "
                "another process: leave labels out, and sum cross-entropies of the logits with "
                "labels that were shifted before the rows were shared"
            )
        out = self.model(
            input_ids,
            attention_mask,
            mask=mask,
            document_ids=document_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            fast_state=fast_state,
            output_hidden_states=output_hidden_states,
        )
        last = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, last])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Give `generate()` a cache that holds fast weights."""
        if (kind := generation_config.cache_implementation) is not None:
            raise ValueError(
                f"cache_implementation={kind!r} has no place for fast weights: leave it out"
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache:
            model_kwargs["past_key_values"] = FastStateCache(self.config)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


AutoConfig.register(LaCTConfig.model_type, LaCTConfig, exist_ok=True)
AutoModel.register(LaCTConfig, LaCTModel, exist_ok=True)
AutoModelForCausalLM.register(LaCTConfig, LaCTForCausalLM, exist_ok=True)
