"""Memory banks inside the decoder layers of a Hugging Face language model."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn

from lightning_modules.adapters import BaseAttentionAdapter
from lightning_modules.adapters.inject import ATTENTION_NAME
from lightning_modules.adapters.token_mask import pass_token_masks, remove_token_masks
from lightning_modules.generation import check_nothing_missed, state_of
from lightning_modules.layers.memory_bank import MemoryBank
from lightning_modules.layers.memory_branch import MemoryBranch, MemoryConfig
from lightning_modules.models.memory_options import MemoryOptions
from lightning_modules.streams import FastState

BANKS = "memory_banks"
"""Name of the banks in the model."""

LAYER_CLASSES = (
    "GemmaDecoderLayer",
    "Gemma2DecoderLayer",
    "Gemma3DecoderLayer",
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen3DecoderLayer",
)
"""Decoder layers of transformers in which the place between attention and MLP is known."""

CONTEXT = ("mask", "document_ids")
"""Keywords that adapters around attention read, too."""

OWN_CONTEXT = ("document_alignment", "prompt_mask")
"""Keywords that end here."""


class MemoryDecoderLayer(nn.Module):
    """A decoder layer with a `memory` inside: mixed into the class of the layer it was.

    Variant A: `x += attention(norm(x)); x += memory(norm(x)); x += mlp(norm(x))`.
    Variant B: the layer as it was; then `x += memory(norm(x)); x += mlp'(norm(x))`.
    """

    memory: MemoryBranch
    memory_slot: str
    memory_variant: str

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See the layer's own class; also takes `fast_state` and what routers read."""
        own = {key: kwargs.pop(key) for key in OWN_CONTEXT if key in kwargs}
        context = own | {key: kwargs[key] for key in CONTEXT if key in kwargs}
        if self.memory_variant == "B":
            hidden_states = super().forward(hidden_states, *args, **kwargs)
            return self.read(hidden_states, kwargs, context)
        # As in the classes of LAYER_CLASSES; Gemma 2 and 3 have norms behind both parts, too.
        sandwich = hasattr(self, "pre_feedforward_layernorm")
        attended = self.self_attn(
            *args, hidden_states=self.input_layernorm(hidden_states), **kwargs
        )[0]
        if sandwich:
            attended = self.post_attention_layernorm(attended)
        hidden_states = self.read(hidden_states + attended, kwargs, context)
        if sandwich:
            changed = self.mlp(self.pre_feedforward_layernorm(hidden_states))
            return hidden_states + self.post_feedforward_layernorm(changed)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    def read(
        self, hidden_states: Tensor, kwargs: dict[str, Any], context: dict[str, Any]
    ) -> Tensor:
        """The residual stream with what the memory adds; the state comes from the cache, if any."""
        fast_state = kwargs.get("fast_state")
        held = kwargs.get("past_key_values") if fast_state is None else None
        constant = getattr(held, "constant", None)
        if carries := isinstance(getattr(held, "fast_state", None), FastState):
            fast_state = state_of(held, len(hidden_states))
        elif held is not None and self.memory.carries_state:
            check_nothing_missed(
                held, self.self_attn.layer_idx, f"the router of {self.memory_slot}"
            )
        hidden_states = self.memory(
            hidden_states, fast_state, self.memory_slot, constant, **context
        )
        if carries:
            held.fast_state = fast_state.advance()
        return hidden_states


@cache
def with_memory(layer_class: type[nn.Module]) -> type[nn.Module]:
    """The class of a decoder layer, with a memory inside."""
    return type(f"Memory{layer_class.__name__}", (MemoryDecoderLayer, layer_class), {})


def inject_memory(model: nn.Module, options: MemoryOptions) -> list[str]:
    """Put memories into decoder layers. With their zero output the model computes what it did.

    Load the base weights first, and put peft's LoRA in first. The layers keep their place and the
    names of their weights: their class is exchanged for one with a memory inside. The memories take
    the device, the dtype and the mode of the layers; the banks are `model.memory_banks`,
    the options `model.memory_options`.

    Args:
        model: a causal language model whose layers are of `LAYER_CLASSES`.
        options: which layers, and what they get.

    Returns:
        Paths of the layers with memory.

    Raises:
        ValueError: a layer that does not exist, a model of another kind, or one with memory.
    """
    layers = decoder_layers(model)
    if hasattr(model, "memory_options"):
        raise ValueError("the model has a memory already: call remove_memory first")
    paths = list(layers)
    chosen = [paths[number] for number in options.places(len(paths))]
    owners = options.bank_of(len(chosen))
    banks = _banks(model, options.memory, 1 + max(owners, default=-1))
    branches = [
        _branch(model, layers[path], options.memory, banks[owner])
        for path, owner in zip(chosen, owners, strict=True)
    ]
    for path, branch in zip(chosen, branches, strict=True):
        layer = layers[path]
        layer.memory = branch.train(layer.training)
        layer.memory_slot = f"{path}.memory"
        layer.memory_variant = options.memory.variant
        layer.__class__ = with_memory(type(layer))
    if len(banks):
        setattr(model, BANKS, banks.train(model.training))
    model.memory_options = options
    pass_token_masks(model, [f"{path}.{ATTENTION_NAME}" for path in chosen])
    return chosen


def remove_memory(model: nn.Module) -> list[str]:
    """Take the memories away: the layers are what they were; returns their paths."""
    removed = []
    for path, layer in memory_layers(model):
        layer.__class__ = type(layer).__bases__[1]
        for name in ("memory", "memory_slot", "memory_variant"):
            delattr(layer, name)
        removed.append(path)
    for name in (BANKS, "memory_options"):
        if hasattr(model, name):
            delattr(model, name)
    if removed:
        remove_token_masks(model)
        modules = model.named_modules()
        pass_token_masks(model, [p for p, m in modules if isinstance(m, BaseAttentionAdapter)])
    return removed


def memory_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Paths and layers with memory, in order."""
    modules = model.named_modules()
    return [(path, module) for path, module in modules if isinstance(module, MemoryDecoderLayer)]


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> decoder layer, in order.

    Raises:
        ValueError: there are none, or they are of a class that is not known.
    """
    paths = [path.rpartition(".") for path, _ in model.named_modules()]
    layers = {owner: model.get_submodule(owner) for owner, _, n in paths if n == ATTENTION_NAME}
    for layer in layers.values():
        if not {c.__name__ for c in type(layer).__mro__} & set(LAYER_CLASSES):
            raise ValueError(
                f"{type(model).__name__} has layers of the class {type(layer).__name__}, in which "
                f"no place for a memory is known; known are {', '.join(LAYER_CLASSES)}"
            )
    if not layers:
        raise ValueError(f"{type(model).__name__} has no decoder layers with {ATTENTION_NAME}")
    return layers


def _banks(model: nn.Module, config: MemoryConfig, count: int) -> nn.ModuleList:
    """So many banks, like the model in device and dtype."""
    size = model.get_decoder().config.hidden_size
    return _like(nn.ModuleList(config.make_bank(size) for _ in range(count)), model)


def _branch(
    model: nn.Module, layer: nn.Module, config: MemoryConfig, bank: MemoryBank
) -> MemoryBranch:
    decoder, mlp = model.get_decoder().config, None
    if config.variant == "B":
        mlp = type(layer.mlp)(decoder).apply(model._init_weights)
    branch = MemoryBranch(decoder.hidden_size, config, bank, decoder.rms_norm_eps, mlp)
    return _like(branch, layer)


def _like(module: nn.Module, other: nn.Module) -> nn.Module:
    """On the other's device, in its dtype."""
    parameter = next(p for p in other.parameters() if p.is_floating_point())
    return module.to(parameter.device, parameter.dtype)
