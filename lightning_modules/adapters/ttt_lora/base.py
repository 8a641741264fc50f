"""Which weights the files of TTT-LoRA belong to."""

from __future__ import annotations

from torch import nn

from lightning_modules.adapters.base_weights import base_fingerprint
from lightning_modules.adapters.ttt_lora.config import TTTLoraConfig


def check_base(config: TTTLoraConfig, model: nn.Module) -> None:
    """Note in an adapter's config which base it belongs to.

    Raises:
        ValueError: it belongs to another one.
    """
    found = base_fingerprint(model)
    if config.base_fingerprint is None:
        config.base_fingerprint = found
    elif found not in (None, config.base_fingerprint):
        raise ValueError(
            f"the adapter was trained on other weights (base_fingerprint "
            f"{config.base_fingerprint}) than this {type(model).__name__} has ({found}): load the "
            "base that it belongs to; to load it anyway, set base_fingerprint to null in its "
            "adapter_config.json"
        )
