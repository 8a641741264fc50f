"""LightningModules that put a memory that learns while it reads into transformers.

The modules are imported on first use, so that `lightning_modules.ops` and
`lightning_modules.layers` load neither lightning nor transformers.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "ActionExpertModule": "lightning_modules.action_expert",
    "LaCTModule": "lightning_modules.lact",
    "MemoryBankModule": "lightning_modules.memory_bank",
    "TTTLoRAModule": "lightning_modules.ttt_lora",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
