"""Files of audio codes, and a DataModule over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from datamodules import AudioCodeDataModule

CODEBOOKS, SIZE = 3, 20
FRAMES = {"a": 11, "b": 4, "c": 23, "d": 2, "e": 7, "f": 16}
"""With chunks of 5 frames: files of one to five chunks, most of them end inside of one."""


def codes_of(name: str, frames: int, codebooks: int = 5) -> np.ndarray:
    """Codes `[codebooks, frames]`, more codebooks than are used."""
    rng = np.random.default_rng([ord(letter) for letter in name])
    return rng.integers(0, SIZE, (codebooks, frames))


def write_codes(folder: Path, frames: dict[str, int] | None = None, copies: int = 1) -> Path:
    """A file for each name, .npy and .safetensors in turn, with and without an axis of batch."""
    codes = folder / "codes"
    codes.mkdir()
    for number, (name, length) in enumerate((frames or FRAMES).items()):
        array = codes_of(name, copies * length).astype(np.int32 if number % 2 else np.int64)
        if number % 2:
            save_file({"codes": array[None]}, codes / f"{name}.safetensors")
        else:
            np.save(codes / f"{name}.npy", array)
    return codes


def make_audio(path: Path, **options: Any) -> AudioCodeDataModule:
    """A prepared DataModule over a folder."""
    defaults = {"codebooks": CODEBOOKS, "codebook_size": SIZE, "chunk_frames": 5, "batch_size": 2}
    cache = str(path.parent / "cache")
    data = AudioCodeDataModule(str(path), cache=cache, **{**defaults, **options})
    data.prepare_data()
    data.setup("fit")
    return data
