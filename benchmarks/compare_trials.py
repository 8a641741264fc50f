"""The arms of `compare_adapters.py`, and which In-Place TTT has the parameters of the LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from training_runs import Arm, Trial, trials_of
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_modules.adapters import as_config
from lightning_modules.models.in_place import InPlaceOptions
from lightning_modules.models.projection_lora import ProjectionLoRA
from lightning_modules.models.ttt_lora import TTTLoRAPlacement, inject_method

METHOD = "model.init_args.method"
STATE = "model.init_args.fast_state"
EVERY_N = "model.init_args.in_place.every_n"
HALF = {"model.init_args.ttt_lora.match_rank": 8, "model.init_args.lora.rank": 8}

BASE, LORA = "base", "lora"
OPTIONAL = ("ttt+lora",)
"""Arms that run when `--trials` names them."""

TTT_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)


def _arm(about: str, method: str, state: str, rates: tuple[float, ...], **more: Any) -> Arm:
    changes = {METHOD: method, STATE: state, **more}
    return Arm("compare_lora_ttt", about, changes, rates)


ARMS: dict[str, Arm] = {
    BASE: _arm("the frozen model as it is", "none", "reset", (0.0,)),
    LORA: _arm("LoRA", "lora", "reset", (2e-4, 5e-4, 1e-3, 2e-3, 4e-3)),
    "ttt_reset": _arm("TTT-LoRA that forgets after every chunk", "ttt_lora", "reset", TTT_RATES),
    "ttt": _arm("TTT-LoRA that remembers through the file", "ttt_lora", "carry", TTT_RATES),
    "in_place": _arm(
        "In-Place TTT that remembers through the file", "in_place", "carry", (2e-4, 1e-3, 4e-3)
    ),
    "ttt+lora": _arm(
        "TTT-LoRA and LoRA, half the size each", "ttt_lora+lora", "carry", TTT_RATES, **HALF
    ),
}

TRIALS: dict[str, Trial] = trials_of(ARMS)


def match_in_place(options: Mapping[str, Any]) -> int:
    """`nearest_in_place` for the options of a `TTTLoRAModule` on a pretrained model."""
    pretrained = options["pretrained"]
    files = {"gguf_file": name} if (name := pretrained.get("gguf_file")) else {}
    return nearest_in_place(AutoConfig.from_pretrained(pretrained["name"], **files), options)


def nearest_in_place(config: Any, options: Mapping[str, Any]) -> int:
    """The `in_place.every_n` whose parameters are nearest to those of the LoRA."""
    wanted = adapter_size(config, "lora", options)
    in_place = options.get("in_place") or {}
    distances = {}
    for every_n in range(1, config.get_text_config().num_hidden_layers + 1):
        changed = {**options, "in_place": {**in_place, "every_n": every_n}}
        distances[every_n] = abs(adapter_size(config, "in_place", changed) - wanted)
    return min(distances, key=distances.__getitem__)


def adapter_size(config: Any, method: Any, options: Mapping[str, Any]) -> int:
    """Parameters that a method adds to a model of a transformers configuration."""
    kinds = {"ttt_lora": TTTLoRAPlacement, "in_place": InPlaceOptions, "lora": ProjectionLoRA}
    given = {name: as_config(kind, options.get(name), name) for name, kind in kinds.items()}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        before = sum(p.numel() for p in model.parameters())
        inject_method(model, method, **given)
    return sum(p.numel() for p in model.parameters()) - before
