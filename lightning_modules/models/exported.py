"""Exported language models: a whole model, or adapters that are put into their base.

Needs torch, transformers and the layers of this package (peft for adapters of peft), not lightning.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_modules.adapters import inject_adapters, parameter_group, read_plan
from lightning_modules.adapters.base_weights import base_fingerprint
from lightning_modules.models import lact  # noqa: F401  tells transformers about LaCT models
from lightning_modules.models.adapter_files import load_adapters
from lightning_modules.models.export_files import ADAPTERS, read_about
from lightning_modules.models.memory_files import load_memory
from lightning_modules.models.peft_files import load_peft


def load_language_model(
    folder: str | Path, base: str | PreTrainedModel | None = None
) -> PreTrainedModel:
    """The model of an export, in evaluation mode; it computes what the trained one did.

    Args:
        folder: that `python -m lightning_modules.export` wrote.
        base: for adapters: where their base lies now (a hub id or a folder), or the loaded base,
            into which they are put. None loads it from where it was in training.

    Raises:
        FileNotFoundError: there is no export.
        ValueError: it is a policy's, the base cannot be loaded or has other weights, or a base is
            given for a whole model.
    """
    source = Path(folder)
    about = read_about(source, policy=False)
    model = _own(source, base) if about["base"] is None else _referenced(about["base"], base)
    layout = about["layout"]
    if layout == "attention":
        _put_attention_adapters(model, source, about["plan"])
    elif layout == "memory":
        load_memory(model, source)
    elif layout == "peft":
        _tell_peft()
        load_peft(model, source, about["adapter"])
    elif layout == "adapters":
        _tell_peft()
        load_adapters(model, source)
    return model.eval()


def save_attention_adapters(model: nn.Module, folder: Path) -> None:
    """Write what `inject_adapters` put into a model, under the names that it has there."""
    save_file(_adapter_state(model), folder / ADAPTERS)


def _adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the adapters' tensors; copies, because safetensors refuses shared memory."""
    return {
        name: value.cpu().clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
        if parameter_group(model, name) is not None
    }


def _put_attention_adapters(model: nn.Module, source: Path, plan: list[Any]) -> None:
    inject_adapters(model, read_plan(plan))
    weights, expected = load_file(source / ADAPTERS), _adapter_state(model)
    if {k: v.shape for k, v in expected.items()} != {k: v.shape for k, v in weights.items()}:
        raise ValueError(f"{source / ADAPTERS} does not have the tensors that its plan describes")
    model.load_state_dict(weights, strict=False)


def _own(source: Path, base: Any) -> PreTrainedModel:
    """A model whose weights lie in the export."""
    if base is not None:
        raise ValueError(f"{source} holds all weights of its model: leave base out")
    return AutoModelForCausalLM.from_pretrained(source, dtype="auto")


def _referenced(about: dict[str, Any], base: str | PreTrainedModel | None) -> PreTrainedModel:
    """The base of adapters, which must have the weights that they were trained with."""
    name = about["name"] if base is None else base
    model = _load(name, about) if isinstance(name, str) else name
    if base_fingerprint(model) != about["fingerprint"]:
        where = repr(name) if isinstance(name, str) else f"the given {type(model).__name__}"
        raise ValueError(
            f"the export's adapters were trained in {about['name']!r} (fingerprint "
            f"{about['fingerprint']}), but {where} has other weights "
            f"({base_fingerprint(model)}): pass base=, the model that they belong to, as it was "
            "before training"
        )
    return model


def _load(name: str, about: dict[str, Any]) -> PreTrainedModel:
    files = {} if about["gguf_file"] is None else {"gguf_file": about["gguf_file"]}
    try:
        return AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, about["dtype"]), **files
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"the base {name!r} of the export's adapters cannot be loaded ({reason}): pass "
            "base=, its hub id or the folder where it lies now"
        ) from error


def _tell_peft() -> None:
    import lightning_modules.adapters.ttt_lora  # noqa: F401  slow: imports peft
