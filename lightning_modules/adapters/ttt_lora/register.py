"""Makes TTT-LoRA a method of peft, which keeps its methods in an enumeration."""

from __future__ import annotations

from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

NAME = "TTT_LORA"


def peft_type() -> PeftType:
    """The member `PeftType.TTT_LORA`, added if it is not there yet.

    peft's own methods are members of an `Enum`, which Python does not let one extend; its registry
    asks for a member. This adds one as Python's `enum` does when it makes a class, and is the only
    place that knows.
    """
    if NAME not in PeftType._member_map_:
        member = str.__new__(PeftType, NAME)
        member._name_, member._value_ = NAME, NAME
        PeftType._member_map_[NAME] = member
        PeftType._value2member_map_[NAME] = member
        PeftType._member_names_.append(NAME)
        type.__setattr__(PeftType, NAME, member)
    return PeftType(NAME)


def register() -> None:
    """Tell peft about the method; once is enough."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    from lightning_modules.adapters.ttt_lora.config import TTTLoraConfig
    from lightning_modules.adapters.ttt_lora.model import TTTLoraModel

    if peft_type() not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(
            name=NAME.lower(), config_cls=TTTLoraConfig, model_cls=TTTLoraModel, prefix="ttt_lora_"
        )
