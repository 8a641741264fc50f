"""A trained memory as files: saved without its base, put back into the base, quantised.

A folder holds `memory.safetensors` and `memory.json` (options, and a fingerprint of the base); with
LoRA also peft's own two files, which `peft.PeftModel.from_pretrained` reads.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_modules.adapters.base_weights import base_fingerprint
from lightning_modules.adapters.fingerprint import fingerprint
from lightning_modules.adapters.registry import as_config
from lightning_modules.layers.memory_bank import QuantizedBank
from lightning_modules.models.folders import new_folder
from lightning_modules.models.memory import BANKS, inject_memory, memory_layers
from lightning_modules.models.memory_options import MemoryOptions
from lightning_modules.models.peft_files import PEFT_WEIGHTS, WRAPPER, load_peft, save_peft

WEIGHTS, OPTIONS = "memory.safetensors", "memory.json"


def save_memory(model: PreTrainedModel, folder: str | Path, with_base: bool = False) -> None:
    """Write memory, and LoRA if there is any. All of it appears at once.

    Args:
        model: has a memory (`inject_memory`).
        folder: a new or empty folder.
        with_base: also write the model without its memory, for one that was trained from scratch:
            `AutoModelForCausalLM.from_pretrained(folder)` reads it, then `load_memory(model,
            folder)` completes it.

    Raises:
        ValueError: the model has no memory.
        FileExistsError: there is something in the folder.
    """
    weights = {name: value.contiguous() for name, value in _memory_state(model).items()}
    with new_folder(folder, "the memory") as part:
        save_file(weights, part / WEIGHTS)
        (part / OPTIONS).write_text(json.dumps(_description(model), indent=2) + "\n")
        if configs := getattr(model, "peft_config", None):
            save_peft(model, part, next(iter(configs)))
        if with_base:
            model.save_pretrained(part, state_dict=_base_state(model))


def load_memory(model: nn.Module, folder: str | Path) -> None:
    """Put a saved memory (and LoRA) into its base.

    Args:
        model: the base that it was trained in, without memory.
        folder: that `save_memory` wrote.

    Raises:
        FileNotFoundError: there is no memory.
        ValueError: it belongs to other weights.
    """
    source = Path(folder)
    if not (source / OPTIONS).exists():
        raise FileNotFoundError(f"{source} holds no {OPTIONS}: give a folder of save_memory")
    stored = json.loads((source / OPTIONS).read_text())
    # Files written before all kinds of adapters named their base alike have the second.
    if stored["base"] not in (base_fingerprint(model), fingerprint(model.named_parameters())):
        raise ValueError(
            f"the memory in {source} was trained in other weights than this "
            f"{type(model).__name__} has: load the model that it belongs to"
        )
    weights = load_file(source / WEIGHTS)
    options = as_config(MemoryOptions, stored["options"], OPTIONS)
    if (source / PEFT_WEIGHTS).exists():
        load_peft(model, source)
    inject_memory(model, options)
    if stored["bits"] is not None:
        quantize_memory(model, stored["bits"])
    expected = _memory_state(model)
    if {k: v.shape for k, v in expected.items()} != {k: v.shape for k, v in weights.items()}:
        raise ValueError(f"{source / WEIGHTS} does not have the tensors that {OPTIONS} describes")
    model.load_state_dict(weights, strict=False)


def quantize_memory(model: nn.Module, bits: int) -> None:
    """Exchange the banks for quantised ones, which cannot be trained any more.

    Args:
        model: has a memory.
        bits: 8 or 4 per number.

    Raises:
        ValueError: there is no bank, or it is quantised already.
    """
    banks = getattr(model, BANKS, None)
    if not banks or any(isinstance(bank, QuantizedBank) for bank in banks):
        raise ValueError("the model has no bank that is not quantised already")
    if model.memory_options.memory.product_keys is not None:
        raise ValueError("the rows of product keys cannot be quantised: only banks with chapters")
    replaced = {id(bank): bank.quantized(bits) for bank in banks}
    for _, layer in memory_layers(model):
        layer.memory.reader.attach(replaced[id(layer.memory.reader.bank)])
    setattr(model, BANKS, nn.ModuleList(replaced[id(bank)] for bank in banks))


def export_banks(model: nn.Module, path: str | Path) -> None:
    """Write the rows of the banks, `bank_0 [N, width]`, ..., as one safetensors file.

    A factorised bank is written as its product, a quantised one as `codes` and `scale`.
    """
    tensors: dict[str, Tensor] = {}
    for number, bank in enumerate(getattr(model, BANKS, ())):
        if isinstance(bank, QuantizedBank):
            parts = {f"bank_{number}.{name}": value for name, value in bank.named_buffers()}
        else:
            parts = {f"bank_{number}": bank.rows().detach()}
        tensors |= {name: value.cpu().contiguous() for name, value in parts.items()}
    if not tensors:
        raise ValueError("the model has no bank to export")
    target = Path(path)
    with tempfile.TemporaryDirectory(dir=target.parent) as place:
        save_file(tensors, Path(place) / "rows")
        os.replace(Path(place) / "rows", target)


def _memory_state(model: nn.Module) -> dict[str, Tensor]:
    """Names and tensors of banks, readers, routers and norms."""
    if not hasattr(model, "memory_options"):
        raise ValueError(f"{type(model).__name__} has no memory: call inject_memory first")
    prefixes = _prefixes(model)
    return {k: v.cpu() for k, v in model.state_dict().items() if k.startswith(prefixes)}


def _prefixes(model: nn.Module) -> tuple[str, ...]:
    """With which the names of banks, readers, routers and norms begin."""
    return (f"{BANKS}.", *(f"{layer.memory_slot}." for _, layer in memory_layers(model)))


def _description(model: nn.Module) -> dict[str, Any]:
    bits = {bank.bits for bank in getattr(model, BANKS, ()) if isinstance(bank, QuantizedBank)}
    return {
        "options": asdict(model.memory_options),
        "bits": next(iter(bits), None),
        "base": base_fingerprint(model),
    }


def _base_state(model: nn.Module) -> dict[str, Tensor]:
    return dict(_of_base(model, model.state_dict().items()))


def _of_base(
    model: nn.Module, tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Those that were there before memory and LoRA, under the names of then."""
    prefixes = _prefixes(model)
    for name, tensor in tensors:
        if not name.startswith(prefixes) and "lora_" not in name:
            yield name.replace(WRAPPER, ""), tensor
