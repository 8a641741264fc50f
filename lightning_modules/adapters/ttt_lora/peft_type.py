"""The name of TTT-LoRA in the enumeration in which peft keeps its methods."""

from __future__ import annotations

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
