"""The weights of a module as files: all of them, or adapters beside a base that has its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_modules.action_expert import ActionExpertModule
from lightning_modules.adapters import base_state_dict, store_plan
from lightning_modules.adapters.base_weights import base_fingerprint
from lightning_modules.lact import LaCTModule
from lightning_modules.language import LanguageModule
from lightning_modules.memory_bank import MemoryBankModule
from lightning_modules.models.adapter_files import PEFT_FOLDERS, save_adapters
from lightning_modules.models.exported import save_attention_adapters
from lightning_modules.models.exported_expert import save_expert
from lightning_modules.models.memory_files import save_memory
from lightning_modules.models.peft_files import save_peft
from lightning_modules.sized import SizedModule
from lightning_modules.ttt_lora import TTTLoRAModule


def save_weights(module: SizedModule, folder: Path) -> dict[str, Any]:
    """Write the weights of a module, in a layout that fits it.

    `expert` a policy; `model` what `save_pretrained` writes; `attention`, `memory`, `peft` and
    `adapters` (of `models.adapter_files`) adapters: with their base as `save_pretrained` writes it
    where that was trained, too.

    Args:
        module: with its weights.
        folder: exists, is empty.

    Returns:
        What `export.json` has to say of them.

    Raises:
        ValueError: nothing of it was trained.
    """
    if isinstance(module, ActionExpertModule):
        return save_expert(module, folder)
    assert isinstance(module, LanguageModule)
    base = _reference(module)
    return {"base": base, **_save_language(module, folder, owns_base=base is None)}


def _save_language(module: LanguageModule, folder: Path, owns_base: bool) -> dict[str, Any]:
    model = module.model
    if isinstance(module, LaCTModule) and module.pretrained is not None:
        if owns_base:
            model.save_pretrained(folder, state_dict=base_state_dict(model))
        save_attention_adapters(model, folder)
        return {"layout": "attention", "plan": store_plan(module.adapters)}
    if isinstance(module, MemoryBankModule) and module.arm in ("memory", "both"):
        save_memory(model, folder, with_base=owns_base)
        return {"layout": "memory"}
    kinds = _kinds(module)
    if kinds in (["lora"], ["ttt_lora"]) and not owns_base:
        name = next(name for name, kind in PEFT_FOLDERS.items() if kind == kinds[0])
        model.peft_config[name].base_model_name_or_path = module.pretrained.name
        save_peft(model, folder, name)
        return {"layout": "peft", "adapter": name}
    if kinds:
        save_adapters(model, folder, with_base=owns_base)
        return {"layout": "adapters"}
    if not owns_base:
        raise ValueError(
            f"nothing was trained: {type(module).__name__} added nothing to the frozen "
            f"{module.pretrained.name}, so there is nothing to export; use that model itself"
        )
    model.save_pretrained(folder)
    return {"layout": "model"}


def _kinds(module: LanguageModule) -> list[str]:
    """Which of TTT-LoRA, LoRA and In-Place TTT the model has."""
    if isinstance(module, MemoryBankModule):
        return ["lora"] if module.arm == "lora" else []
    if isinstance(module, TTTLoRAModule) and module.method != "none":
        return module.method.split("+")
    return []


def _reference(module: LanguageModule) -> dict[str, Any] | None:
    """The base that is not exported; None where its weights were trained."""
    options = module.pretrained
    if options is None or options.train == "all":
        return None
    return {
        "name": options.name,
        "gguf_file": options.gguf_file,
        "dtype": options.dtype,
        "fingerprint": base_fingerprint(module.model),
    }
