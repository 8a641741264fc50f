"""Which tokens are real: from a model's 2D attention mask to the keyword `mask` of adapters."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

INPUTS = ("input_ids", "inputs_embeds")


class TokenMaskHook:
    """Forward pre-hook on a decoder: adds `mask=`, bool `[B, T]`, where the caller gave none.

    Padding `[B, past + T]` arrives at a decoder as its `attention_mask` and leaves it as a 4D mask
    for attention; fast weights need the 2D one, so that padding writes nothing. The keyword goes
    down to the layers like every other, also through activation checkpointing. Without a 2D mask
    (None, or one that was made 4D before the call) nothing is added: all tokens count.

    Args:
        names: parameters of the decoder's forward, in their order.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """See `torch.nn.Module.register_forward_pre_hook(with_kwargs=True)`."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        attention_mask = given.get("attention_mask")
        if given.get("mask") is not None or not _is_padding(attention_mask):
            return None
        inputs = next(given[name] for name in INPUTS if given.get(name) is not None)
        return args, {**kwargs, "mask": attention_mask[:, -inputs.shape[1] :].bool()}


def pass_token_masks(model: nn.Module, attentions: Iterable[str]) -> None:
    """Put a `TokenMaskHook` on the decoders that own these attention modules (by path).

    A model for images and text around a decoder gets one too: it makes a 4D mask before it calls
    the decoder.
    """
    for path in attentions:
        for module in decoders(model, path):
            hooks = module._forward_pre_hooks.values()
            if not any(isinstance(hook, TokenMaskHook) for hook in hooks):
                names = inspect.signature(module.forward).parameters
                module.register_forward_pre_hook(TokenMaskHook(names), with_kwargs=True)


def remove_token_masks(model: nn.Module) -> None:
    """Take all `TokenMaskHook`s away, also those of a copied model."""
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, TokenMaskHook)]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _is_padding(attention_mask: Any) -> bool:
    return isinstance(attention_mask, Tensor) and attention_mask.dim() == 2


def decoders(model: nn.Module, path: str) -> list[nn.Module]:
    """The innermost module around an attention that takes tokens, and models of more around it.

    Taking tokens is: `forward` has them and `attention_mask`, and takes more keywords. Models of
    more have a part that is their decoder, and another base model than it.
    """
    found: list[nn.Module] = []
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        if _takes_tokens(module) and (not found or _has_more_than(module, found[0])):
            found.append(module)
    return found


def _takes_tokens(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters
    takes_more = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return takes_more and "attention_mask" in parameters and bool(parameters.keys() & set(INPUTS))


def _has_more_than(module: nn.Module, decoder: nn.Module) -> bool:
    if not hasattr(module, "get_decoder") or module.get_decoder() is not decoder:
        return False
    return getattr(module, "base_model", None) is not decoder
