"""Adapters of peft in a model that is no `PeftModel`, and their files, which peft itself reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
"""Of every name in peft's files."""

WRAPPER = ".base_layer"
"""What peft puts into the names of the weights that it wraps."""


def put_beside(model: nn.Module, config: Any, name: str = "default") -> None:
    """Put an adapter of peft into a model, in place, beside those of other kinds that it has.

    Args:
        model: peft freezes what is no adapter.
        config: a `peft.PeftConfig`.
        name: of the adapter; no other has it.
    """
    from peft import inject_adapter_in_model  # slow to import, and seldom needed

    before = model.__dict__.pop("peft_config", {})
    try:
        inject_adapter_in_model(config, model, adapter_name=name)
    finally:
        if configs := {**before, **model.__dict__.get("peft_config", {})}:
            model.peft_config = configs


def save_peft(model: nn.Module, folder: Path, name: str = "default") -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    `peft.PeftModel.from_pretrained(base, folder)` reads them; where adapters of several kinds wrap
    a layer, each is written as if it were alone.

    Args:
        model: has the adapter.
        folder: exists.
        name: of the adapter.
    """
    from peft import get_peft_model_state_dict

    from lightning_modules.adapters.base_weights import base_fingerprint

    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    tensors = {
        f"{PEFT_PREFIX}{key.replace(WRAPPER, '')}": value.cpu().contiguous()
        for key, value in state.items()
    }
    save_file(tensors, folder / PEFT_WEIGHTS)
    config = model.peft_config[name]
    if hasattr(config, "base_fingerprint"):  # the base may have been trained since
        config.base_fingerprint = base_fingerprint(model)
    config.save_pretrained(folder)


def load_peft(model: nn.Module, folder: Path, name: str = "default") -> None:
    """Put an adapter that `save_peft` or peft wrote into a model.

    Args:
        model: has no adapter of this name; later ones go around it.
        folder: of the files.
        name: of the adapter.

    Raises:
        ValueError: the weights are not those of the adapter that the config describes.
    """
    from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict

    put_beside(model, PeftConfig.from_pretrained(folder), name)
    stored = load_file(folder / PEFT_WEIGHTS)
    state = {key.removeprefix(PEFT_PREFIX): value for key, value in stored.items()}
    expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    shapes = {key.replace(WRAPPER, ""): value.shape for key, value in expected.items()}
    if shapes != {key: value.shape for key, value in state.items()}:
        raise ValueError(
            f"{folder / PEFT_WEIGHTS} does not have the tensors that its adapter_config.json "
            f"describes for this {type(model).__name__}: load the model that it belongs to"
        )
    found = {key: state[key.replace(WRAPPER, "")] for key in expected}
    set_peft_model_state_dict(model, found, adapter_name=name)
