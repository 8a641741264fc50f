"""Hooks by which fast state reaches modules deep inside a decoder layer.

The decoder takes the fast state from the keyword `fast_state` or from a cache that carries one,
and hands it down to its layers' attention like every other keyword. A hook on attention tells the
other modules of the layer (`DeepContext`). It runs inside activation checkpointing, so that what
is recomputed in backward sees the state of its own chunk.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_modules.adapters.base import BaseAttentionAdapter
from lightning_modules.adapters.inject import ATTENTION_NAME
from lightning_modules.adapters.token_mask import decoders, pass_token_masks, remove_token_masks
from lightning_modules.generation import state_of
from lightning_modules.layers.deep_context import DeepContext, looks_into_context
from lightning_modules.streams import FastState

NAMES = ("fast_state", "mask", "document_ids")


class EnterLayer:
    """Forward pre-hook on the attention of a layer: fills in the layer's context.

    A plain attention module does not see the keywords any more.
    """

    def __init__(self) -> None:
        self.context = DeepContext()

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """See `torch.nn.Module.register_forward_pre_hook(with_kwargs=True)`."""
        given = {name: kwargs.get(name) for name in NAMES}
        cache, layer = kwargs.get("past_key_values"), getattr(module, "layer_idx", None)
        missed = 0
        if cache is not None and layer is not None and given["fast_state"] is None:
            missed = int(cache.get_seq_length(layer))
        self.context.enter(**given, missed=missed)
        shared = given["fast_state"] is not None and given["fast_state"].group is not None
        if not isinstance(module, BaseAttentionAdapter) and not shared:
            kwargs = {key: value for key, value in kwargs.items() if key not in NAMES}
        return args, kwargs


class OpenState:
    """Forward pre-hook on a decoder: the fast state that a cache carries becomes a keyword."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """See `torch.nn.Module.register_forward_pre_hook(with_kwargs=True)`."""
        cache = kwargs.get("past_key_values")
        carries = isinstance(getattr(cache, "fast_state", None), FastState)
        if not carries or kwargs.get("fast_state") is not None:
            return None
        given = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        rows = next(len(value) for value in given if value is not None)
        return args, {**kwargs, "fast_state": state_of(cache, rows)}


class CloseState:
    """Forward hook on a decoder: the cache gets the next state, the layers let go of the last.

    Args:
        contexts: of the decoder's layers.
    """

    def __init__(self, contexts: list[DeepContext]) -> None:
        self.contexts = contexts

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """See `torch.nn.Module.register_forward_hook(with_kwargs=True)`.

        Raises:
            RuntimeError: the state, the mask or the documents did not reach the layers.
        """
        handle, cache = kwargs.get("fast_state"), kwargs.get("past_key_values")
        for name in NAMES:
            if any(getattr(context, name) is not kwargs.get(name) for context in self.contexts):
                raise RuntimeError(
                    f"{name} of {type(module).__name__} did not reach all of its layers: put "
                    "attention adapters in before TTT-LoRA and In-Place TTT"
                )
        if handle is not None and handle is getattr(cache, "fast_state", None):
            cache.fast_state = handle.advance()
        for context in self.contexts:
            context.clear()


def connect(model: nn.Module, paths: list[str]) -> dict[str, DeepContext | None]:
    """Give modules of decoder layers the context of their layer; those that have one keep it.

    Args:
        model: has the layers; decoders as Hugging Face has them, whose layers call a module
            `self_attn` first, with keywords.
        paths: of the modules.

    Returns:
        The contexts by path; None for a module that is in no such layer.
    """
    attentions = {path: _attention_beside(model, path) for path in paths}
    contexts: dict[str, DeepContext] = {}
    for path in sorted({path for path in attentions.values() if path is not None}):
        contexts[path] = _context(model.get_submodule(path))
        for decoder in decoders(model, path)[:1]:
            _watch(decoder, contexts[path])
    pass_token_masks(model, contexts)
    return {path: contexts.get(place) if place else None for path, place in attentions.items()}


def disconnect(model: nn.Module) -> None:
    """Take the hooks away that no module needs any more, also those that pass token masks."""
    if looks_into_context(model):
        return
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            own = (EnterLayer, OpenState, CloseState)
            for key in [key for key, hook in hooks.items() if isinstance(hook, own)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_with_kwargs.pop(key, None)
    if not any(isinstance(module, BaseAttentionAdapter) for module in model.modules()):
        remove_token_masks(model)


def _attention_beside(model: nn.Module, path: str) -> str | None:
    """Path of the attention of the layer that a module is in."""
    while path:
        path = path.rpartition(".")[0]
        if hasattr(model.get_submodule(path), ATTENTION_NAME):
            return f"{path}.{ATTENTION_NAME}".lstrip(".")
    return None


def _context(attention: nn.Module) -> DeepContext:
    for hook in attention._forward_pre_hooks.values():
        if isinstance(hook, EnterLayer):
            return hook.context
    hook = EnterLayer()
    attention.register_forward_pre_hook(hook, with_kwargs=True)
    return hook.context


def _watch(decoder: nn.Module, context: DeepContext) -> None:
    """Let a decoder open and close the state around a layer's context."""
    for hook in decoder._forward_hooks.values():
        if isinstance(hook, CloseState):
            if context not in hook.contexts:
                hook.contexts.append(context)
            return
    decoder.register_forward_pre_hook(OpenState(), with_kwargs=True)
    decoder.register_forward_hook(CloseState([context]), with_kwargs=True)
