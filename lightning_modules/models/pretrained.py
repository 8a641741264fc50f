"""A pretrained language model as the base of adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lightning_modules.adapters.base_weights import base_fingerprint
from lightning_modules.adapters.fingerprint import fingerprint


@dataclass(frozen=True)
class PretrainedOptions:
    """Which language model is adapted, and what of it is trained.

    Args:
        name: hub id such as HuggingFaceTB/SmolLM2-135M, or a folder that `save_pretrained` wrote.
        gguf_file: file of quantised weights in it, which are dequantised; None takes safetensors.
        dtype: precision of the loaded weights; adapters are made in the same.
        train: `adapters` freezes what was loaded, and checkpoints leave it out; `all` trains it.
        gradient_checkpointing: recompute the layers in backward instead of keeping activations.
    """

    name: str
    gguf_file: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    train: Literal["adapters", "all"] = "adapters"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("pretrained.name is empty: give a hub id or a folder")

    def load(self) -> PreTrainedModel:
        """The model in training mode, frozen unless `train` is `all`.

        It is loaded in evaluation mode, which Lightning would keep: dropout, the losses of routers
        and the recomputation of layers would silently be off.

        Raises:
            ValueError: nothing usable is there; the message names it.
        """
        files: dict[str, Any] = {} if self.gguf_file is None else {"gguf_file": self.gguf_file}
        try:
            model = AutoModelForCausalLM.from_pretrained(
                self.name, dtype=getattr(torch, self.dtype), **files
            )
        except (OSError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"pretrained.name={self.name!r} cannot be loaded ({reason}): give the hub id of a "
                "causal language model, or a folder that save_pretrained wrote"
            ) from error
        model.requires_grad_(self.train == "all")
        if self.gradient_checkpointing:
            # The name until transformers 5.2x, which deprecates it.
            older = model.gradient_checkpointing_enable
            enable = getattr(model, "activation_checkpointing_enable", older)
            enable({"use_reentrant": False})
            model.enable_input_require_grads()
        return model.train()

    def load_for(self, vocab_size: int) -> PreTrainedModel:
        """`load`, for data with so many token ids.

        Raises:
            ValueError: the model does not know all of them.
        """
        model = self.load()
        if vocab_size > model.config.vocab_size:
            raise ValueError(
                f"the data has token ids up to {vocab_size - 1}, but {self.name} knows "
                f"{model.config.vocab_size}: tokenise the data with the model's own tokenizer "
                "(data.init_args.tokenizer)"
            )
        return model


def check_base(config: Mapping[str, Any] | None, pretrained: PretrainedOptions | None) -> None:
    """Exactly one of both says what the base is.

    Raises:
        ValueError: neither or both do, or a model from scratch is of no known kind.
    """
    if (config is None) == (pretrained is None):
        raise ValueError(
            "give either config (a model from scratch) or pretrained (a model to adapt)"
        )
    if config is not None:
        _check_config(config)


def _check_config(config: Mapping[str, Any]) -> None:
    """Refuse a kind of model, a key or a value that transformers does not know.

    It takes a key that it does not know for an attribute, so that a misspelt one has no effect.
    """
    if "model_type" not in config:
        raise ValueError("config needs model_type, e.g. llama or qwen3")
    kind = config["model_type"]
    if kind not in CONFIG_MAPPING:
        close = get_close_matches(str(kind), CONFIG_MAPPING, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "e.g. llama or qwen3"
        raise ValueError(f"config.model_type={kind!r} is unknown to transformers; {hint}")
    config_class = CONFIG_MAPPING[kind]
    known = {field.name for field in fields(config_class)} | {*config_class.attribute_map}
    for key in config:
        if key not in known | {"model_type", "attn_implementation"}:
            close = get_close_matches(str(key), known, n=1, cutoff=0.0)
            raise ValueError(f"config: unknown key {key!r} of {kind}; did you mean {close[0]!r}?")
    try:
        AutoConfig.for_model(**deepcopy(dict(config)))
    except Exception as error:  # transformers raises classes of its own and of huggingface_hub
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"config of {kind}: {reason}") from error


def build_base(
    config: Mapping[str, Any] | None, pretrained: PretrainedOptions | None, vocab_size: int
) -> PreTrainedModel:
    """A model from scratch, or a pretrained one, for data with so many token ids.

    Args:
        config: entries of a transformers configuration, `model_type` among them.
        pretrained: what to load instead.
        vocab_size: of the data.
    """
    if pretrained is not None:
        return pretrained.load_for(vocab_size)
    assert config is not None  # `check_base`
    sizes = {**deepcopy(dict(config)), "vocab_size": vocab_size}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes))


class LeftOut:
    """Frozen weights of a pretrained model: left out of checkpoints, put back from the model.

    Args:
        model: as it was loaded, before adapters were injected; renaming by adapters is followed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._ids = {id(p) for p in model.parameters() if not p.requires_grad}
        self._names: set[str] | None = None
        self._fingerprints: tuple[str | None, ...] = ()

    def settle(self, module: nn.Module) -> None:
        """Know the weights by their names from now on, before sharding replaces them all."""
        self.fingerprint(module)
        self._names = {name for name, _ in self.named(module)}

    def named(self, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """The frozen weights with the names that they have in `module`, tied ones under each."""
        for name, parameter in module.named_parameters(remove_duplicate=False):
            known = id(parameter) in self._ids if self._names is None else name in self._names
            if known:
                yield name, parameter

    def fingerprint(self, module: nn.Module) -> str | None:
        """Short hash of the base; None if nothing is left out."""
        return self._known(module)[0]

    def agrees(self, module: nn.Module, stored: str | None) -> bool:
        """Whether a checkpoint with this fingerprint was trained on the same base."""
        return stored in self._known(module)

    def _known(self, module: nn.Module) -> tuple[str | None, ...]:
        """The base's fingerprint, and the one that checkpoints had before adapters' files did."""
        if not self._ids:
            return (None,)
        if not self._fingerprints:
            self._fingerprints = (base_fingerprint(module), fingerprint(self.named(module)))
        return self._fingerprints
