"""DataModules of the batch contract, and the simulators that robot data is recorded in.

The DataModules are imported on first use: recording workers import this package, and neither
they nor a reader of LeRobot folders need Lightning.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "ActionChunkDataModule": "datamodules.action_chunks",
    "AudioCodeDataModule": "datamodules.audio_codes",
    "ChatDataModule": "datamodules.chat",
    "RecallDataModule": "datamodules.recall",
    "RecordedSimulation": "datamodules.action_chunks",
    "StreamDataModule": "datamodules.base",
    "TextStreamDataModule": "datamodules.text_streams",
}

__all__ = [
    "ActionChunkDataModule",
    "AudioCodeDataModule",
    "ChatDataModule",
    "RecallDataModule",
    "RecordedSimulation",
    "StreamDataModule",
    "TextStreamDataModule",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
