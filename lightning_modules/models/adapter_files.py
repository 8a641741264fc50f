"""Trained adapters as files: TTT-LoRA, In-Place TTT and LoRA, saved without their base.

A folder holds `adapters.json` (what was saved, and a fingerprint of the base) and a folder for each
kind: `ttt_lora` and `lora` with peft's own two files, `in_place` with `in_place.safetensors` and
`in_place.json`.

    import lightning_modules.adapters.ttt_lora  # tells peft about the method
    model = peft.PeftModel.from_pretrained(base, "saved/ttt_lora")
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_modules.adapters.base_weights import base_fingerprint
from lightning_modules.adapters.registry import as_config
from lightning_modules.models.folders import new_folder
from lightning_modules.models.in_place import InPlaceOptions, inject_in_place
from lightning_modules.models.peft_files import WRAPPER, load_peft, save_peft
from lightning_modules.models.ttt_lora import TTT_LORA, parameter_group

CONTENTS = "adapters.json"
IN_PLACE, IN_PLACE_WEIGHTS, IN_PLACE_OPTIONS = "in_place", "in_place.safetensors", "in_place.json"
PEFT_FOLDERS = {TTT_LORA: "ttt_lora", "default": "lora"}
"""Name of an adapter in the model -> its folder; loaded in this order, the later ones outside."""


def save_adapters(model: PreTrainedModel, folder: str | Path, with_base: bool = False) -> None:
    """Write what `inject_method` put into a model and training made of it. It appears at once.

    Args:
        model: has adapters.
        folder: a new or empty folder.
        with_base: also write the model without its adapters, for one that was trained from scratch:
            `AutoModelForCausalLM.from_pretrained(folder)` reads it, then `load_adapters(model,
            folder)` completes it.

    Raises:
        ValueError: the model has no adapters, or others of peft.
        FileExistsError: there is something in the folder.
    """
    kinds = _kinds(model)
    if not kinds:
        raise ValueError(f"{type(model).__name__} has no adapters to save: see inject_method")
    with new_folder(folder, "the adapters") as part:
        for kind in kinds:
            (part / kind).mkdir()
            if kind == IN_PLACE:
                _save_in_place(model, part / kind)
        for name, kind in PEFT_FOLDERS.items():
            if kind in kinds:
                save_peft(model, part / kind, name)
        contents = {"adapters": kinds, "base": base_fingerprint(model)}
        (part / CONTENTS).write_text(json.dumps(contents, indent=2) + "\n")
        if with_base:
            model.save_pretrained(part, state_dict=dict(_of_base(model.state_dict().items())))


def load_adapters(model: nn.Module, folder: str | Path) -> list[str]:
    """Put saved adapters into their base, in place, as they were after training.

    Args:
        model: the base that they were trained in, without adapters.
        folder: that `save_adapters` wrote.

    Returns:
        What was loaded: `in_place`, `ttt_lora`, `lora`.

    Raises:
        FileNotFoundError: there are no adapters.
        ValueError: they belong to other weights, or the model has adapters.
    """
    source = Path(folder)
    if not (source / CONTENTS).exists():
        raise FileNotFoundError(f"{source} holds no {CONTENTS}: give a folder of save_adapters")
    if present := _kinds(model):
        raise ValueError(f"the model has {', '.join(present)} already: load into a fresh base")
    contents = json.loads((source / CONTENTS).read_text())
    if contents["base"] != base_fingerprint(model):
        raise ValueError(
            f"the adapters in {source} were trained in other weights than this "
            f"{type(model).__name__} has: load the model that they belong to"
        )
    kinds: list[str] = contents["adapters"]
    if IN_PLACE in kinds:
        _load_in_place(model, source / IN_PLACE)
    for name, kind in PEFT_FOLDERS.items():
        if kind in kinds:
            load_peft(model, source / kind, name)
    return kinds


def _kinds(model: nn.Module) -> list[str]:
    """What the model has of `in_place`, `ttt_lora` and `lora`."""
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    if unknown := sorted(set(configs) - set(PEFT_FOLDERS)):
        raise ValueError(
            f"the model has adapters of peft named {', '.join(unknown)}, not put in by "
            "inject_method: save them with peft"
        )
    found = [IN_PLACE] if hasattr(model, "in_place_options") else []
    return found + [kind for name, kind in PEFT_FOLDERS.items() if name in configs]


def _save_in_place(model: nn.Module, folder: Path) -> None:
    save_file(_in_place_state(model), folder / IN_PLACE_WEIGHTS)
    options = json.dumps(asdict(model.in_place_options), indent=2)
    (folder / IN_PLACE_OPTIONS).write_text(options + "\n")


def _load_in_place(model: nn.Module, folder: Path) -> None:
    stored = json.loads((folder / IN_PLACE_OPTIONS).read_text())
    weights = load_file(folder / IN_PLACE_WEIGHTS)
    inject_in_place(model, as_config(InPlaceOptions, stored, IN_PLACE_OPTIONS))
    expected = _in_place_state(model)
    if {k: v.shape for k, v in expected.items()} != {k: v.shape for k, v in weights.items()}:
        raise ValueError(
            f"{folder / IN_PLACE_WEIGHTS} does not have the tensors that {IN_PLACE_OPTIONS} "
            "describes"
        )
    model.load_state_dict(weights, strict=False)


def _in_place_state(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.replace(WRAPPER, ""): value.cpu().contiguous()
        for name, value in model.state_dict().items()
        if parameter_group(name) == IN_PLACE
    }


def _of_base(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Those that were there before the adapters, under the names of then."""
    for name, tensor in tensors:
        if parameter_group(name) == "base":
            yield name.replace(WRAPPER, ""), tensor
