"""What an export's folder says of itself: `export.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ABOUT = "export.json"
WEIGHTS = "model.safetensors"
ADAPTERS = "adapters.safetensors"
"""Attention adapters of a language model; other kinds have the files of their own modules."""

FORMAT = 1
"""Raise it when what is stored changes; newer formats than this one are refused."""


def write_about(folder: Path, about: Mapping[str, Any]) -> None:
    """Write `export.json`, with the format's number."""
    text = json.dumps({"format": FORMAT, **about}, indent=2)
    (folder / ABOUT).write_text(text + "\n", encoding="utf-8")


def read_about(folder: str | Path, policy: bool) -> dict[str, Any]:
    """What `export.json` holds.

    Args:
        folder: of the export.
        policy: whether an action expert is expected, or a language model.

    Raises:
        FileNotFoundError: there is no export.
        ValueError: it is of a newer version, or of the other kind.
    """
    path = Path(folder) / ABOUT
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {ABOUT}: give a folder that python -m lightning_modules.export "
            "wrote"
        )
    about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if about["format"] > FORMAT:
        raise ValueError(
            f"{path} has format {about['format']}, this version reads up to {FORMAT}: update "
            "fast-weights"
        )
    if policy != (about["layout"] == "expert"):
        use = "load_language_model of lightning_modules.models.exported"
        use = use if policy else "ActionExpertPolicy.from_export of lightning_modules.policy"
        raise ValueError(f"{folder} is the export of a {about['variant']}: load it with {use}")
    return about
