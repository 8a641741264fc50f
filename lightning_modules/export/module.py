"""The module of a checkpoint, chosen by what the checkpoint says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning_modules
from lightning_modules.action_expert import CHECKPOINT_KEY
from lightning_modules.sized import SizedModule


def rebuild(checkpoint: Any, pretrained: str | None = None) -> SizedModule:
    """The module with its weights, in evaluation mode.

    Args:
        checkpoint: content of the file.
        pretrained: where the pretrained weights lie now, if they have moved since training.

    Raises:
        ValueError: it is the checkpoint of something else, or its pretrained weights are not there.
    """
    keys = {name: name for name in lightning_modules.__all__} | {
        "ActionExpertModule": CHECKPOINT_KEY
    }
    found = checkpoint if isinstance(checkpoint, Mapping) else {}
    for name, key in keys.items():
        if key in found:
            return getattr(lightning_modules, name).rebuild(checkpoint, pretrained)
    raise ValueError(
        f"this is the checkpoint of none of {', '.join(keys)}: use one that `python cli.py fit` "
        "wrote with this version"
    )
