"""Makes TTT-LoRA a method of peft."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

from lightning_modules.adapters.ttt_lora.config import TTTLoraConfig
from lightning_modules.adapters.ttt_lora.model import TTTLoraModel
from lightning_modules.adapters.ttt_lora.peft_type import NAME, peft_type


def register() -> None:
    """Tell peft about the method; once is enough."""
    if peft_type() not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(
            name=NAME.lower(), config_cls=TTTLoraConfig, model_cls=TTTLoraModel, prefix="ttt_lora_"
        )
