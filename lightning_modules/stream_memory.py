"""What one stream has learned, as a file: saved, listed, and given to other streams to begin with.

A memory belongs to the exact weights that read the stream, as it is a change of them (or, of LaCT,
what has become of them); another model is refused. Training on makes another model. It holds the
fast state alone: no keys and values of a Hugging Face cache, no text.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from lightning_modules.models.identity import Weights
from lightning_modules.slots import Slots, check_one_row, map_fields, repeat_row
from lightning_modules.streams import StreamState

FORMAT = "stream memory 1"
KEYS = ("stream_id", "chunk_index", "name", "fingerprint", "weights")
"""Of the file's metadata, all strings."""
SUFFIX = ".safetensors"


@dataclass(frozen=True, eq=False, repr=False)
class StreamMemory:
    """What one stream has learned, on the CPU.

    ```python
    memory = StreamMemory.of(module.streams, "predict", 7, model=module, name="a book")
    memory.save("book.safetensors")
    memory = StreamMemory.load("book.safetensors", model=module)  # another model is refused
    module.streams.attach(memory.slots)  # every file is now read by one who knows the book
    cache = FastStateCache(model.config, slots=memory.rows(len(prompts)))  # and so is a prompt
    ```

    Args:
        slots: fast state of one row, slot -> field -> `[1, ...]`.
        stream_id: which file of its DataModule it was, a number.
        chunk_index: number of the last chunk that was read, from 0.
        weights: of the model that read it.
        name: any text.

    Raises:
        ValueError: there is no fast state, or of more rows than one.
    """

    slots: Slots
    stream_id: int
    chunk_index: int
    weights: Weights
    name: str = ""

    def __post_init__(self) -> None:
        if not self.slots:
            raise ValueError(
                f"stream {self.stream_id} has learned nothing that could be kept: its model has no "
                "fast weights, or its streams do not persist (fast_state: reset)"
            )
        check_one_row(self.slots)
        # A copy that autograd may use, also where it is made under inference mode.
        with torch.inference_mode(False), torch.no_grad():
            copied = map_fields(self.slots, lambda value: value.detach().to("cpu", copy=True))
        object.__setattr__(self, "slots", copied)

    @classmethod
    def of(
        cls,
        streams: StreamState,
        namespace: str,
        stream_id: int,
        *,
        model: nn.Module | Weights,
        name: str = "",
    ) -> StreamMemory:
        """What a stream has learned up to the last commit. Waits for the device.

        Args:
            streams: of the module (`module.streams`).
            namespace: `train`, `validate`, `test` or `predict`.
            stream_id: of a file that a row is reading, or was last reading.
            model: the model or its LightningModule; its `Weights` if they are known.
            name: any text.

        Raises:
            ValueError: no row reads that stream (the message has the ids of those that are), or
                nothing was learned.
        """
        chunk_index, slots = streams.row(namespace, stream_id)
        weights = model if isinstance(model, Weights) else Weights.of(model)
        return cls(slots, stream_id, chunk_index, weights, name)

    def __repr__(self) -> str:
        return (
            f"StreamMemory({self.name!r}, stream {self.stream_id} up to chunk {self.chunk_index}, "
            f"{len(self.slots)} slots, weights {self.fingerprint})"
        )

    @property
    def fingerprint(self) -> str:
        """Short hash of the weights that it belongs to."""
        return self.weights.fingerprint

    def rows(self, n: int, device: torch.device | str = "cpu") -> Slots:
        """The slots repeated for a batch of n rows, `[n, ...]`, with memory of their own."""
        if n < 1:
            raise ValueError(f"n={n} must be at least 1: the rows of a batch")
        return repeat_row(map_fields(self.slots, lambda value: value.to(device)), n)

    def check(self, model: nn.Module) -> None:
        """Raise unless the memory belongs to exactly this model's weights.

        Options that are no weights are not compared; those that change the state's shape (chunk
        and mini-batch sizes, a window) are noticed by the first chunk.

        Args:
            model: the model, its LightningModule, or whatever is wrapped around it.

        Raises:
            ValueError: it belongs to others; the message says which differ.
        """
        if (difference := self.weights.difference(model)) is not None:
            name = f" ({self.name})" if self.name else ""
            raise ValueError(
                f"the memory of stream {self.stream_id}{name} belongs to other weights than this "
                f"{type(model).__name__} has: {difference}; load the checkpoint with which the "
                "stream was read (--ckpt_path), or read it again with this model"
            )

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write one file, which appears when it is complete.

        Args:
            path: ends in .safetensors; folders are made.
            overwrite: replace a file that is there.

        Returns:
            The path.

        Raises:
            FileExistsError: it is there.
            ValueError: the name has another ending.
        """
        target = Path(path)
        if target.suffix != SUFFIX:
            raise ValueError(f"{target} must end in {SUFFIX}, so that list_memories finds it")
        if target.exists() and not overwrite:
            raise FileExistsError(f"{target} exists: choose another name, or overwrite=True")
        target.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{slot}/{field}": value.contiguous()
            for slot, fields in self.slots.items()
            for field, value in fields.items()
        }
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}_") as place:
            part = Path(place) / "part"
            save_file(tensors, part, metadata=self._metadata())
            _flush_to_disk(part)
            os.replace(part, target)
        return target

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> StreamMemory:
        """Read a file.

        Args:
            path: what `save` wrote.
            model: to be compared with the one that it belongs to (`check`); None does not.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is broken, no memory, or of another model.
        """
        with _opened(Path(path)) as file:
            about = _read_metadata(file, path)
            slots: Slots = {}
            for key in file.keys():  # noqa: SIM118  (no mapping)
                slot, _, field = key.rpartition("/")
                slots.setdefault(slot, {})[field] = file.get_tensor(key)
        weights = Weights(json.loads(about["weights"]))
        place = int(about["stream_id"]), int(about["chunk_index"])
        memory = cls(slots, *place, weights, about["name"])
        if model is not None:
            memory.check(model)
        return memory

    def _metadata(self) -> dict[str, str]:
        return {
            "format": FORMAT,
            "stream_id": str(self.stream_id),
            "chunk_index": str(self.chunk_index),
            "name": self.name,
            "fingerprint": self.fingerprint,
            "weights": json.dumps(dict(self.weights.digests)),
        }


@dataclass(frozen=True)
class MemoryFile:
    """What the header of a file says; `str()` is one line of it.

    Args:
        path: of the file.
        size: in bytes.
        error: why it cannot be read; None: it can. Otherwise the rest says nothing.
        name: any text.
        stream_id: which file of its DataModule it was.
        chunk_index: number of the last chunk that was read.
        slots: how many layers have learned.
        fingerprint: of the weights that it belongs to.
    """

    path: Path
    size: int
    error: str | None = None
    name: str = ""
    stream_id: int | None = None
    chunk_index: int | None = None
    slots: int = 0
    fingerprint: str = ""

    def __str__(self) -> str:
        if self.error is not None:
            return f"{self.path.name}: {self.error}"
        return (
            f"{self.path.name}: {self.name or 'no name'}, stream {self.stream_id} up to chunk "
            f"{self.chunk_index}, {self.slots} slots, {self.size / 1e6:.1f} MB, weights "
            f"{self.fingerprint}"
        )


def list_memories(folder: str | Path) -> list[MemoryFile]:
    """What lies in a folder, by file name; of every file only the header is read.

    A broken file, or one that is no memory, has an `error` that says so.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    place = Path(folder)
    if not place.is_dir():
        raise FileNotFoundError(f"{place} is no folder: give one that holds memories")
    return [_describe(path) for path in sorted(place.glob(f"*{SUFFIX}")) if path.is_file()]


def _describe(path: Path) -> MemoryFile:
    size = path.stat().st_size
    try:
        with _opened(path) as file:
            about = _read_metadata(file, path)
            slots = {key.rpartition("/")[0] for key in file.keys()}  # noqa: SIM118
        place = int(about["stream_id"]), int(about["chunk_index"])
    except ValueError as error:
        return MemoryFile(path, size, str(error))
    return MemoryFile(path, size, None, about["name"], *place, len(slots), about["fingerprint"])


def _opened(path: Path) -> Any:
    """The file as a context manager, from which tensors can be read one by one."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no memory {path}: name a file that save wrote")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is broken or no safetensors file ({error}): save the memory again"
        ) from error


def _read_metadata(file: Any, path: str | Path) -> dict[str, str]:
    metadata: dict[str, str] = file.metadata() or {}
    absent = [key for key in KEYS if key not in metadata]
    if metadata.get("format") != FORMAT or absent:
        raise ValueError(
            f"{path} is no stream memory of this version: give a file that StreamMemory.save wrote"
        )
    return metadata


def _flush_to_disk(path: Path) -> None:
    """Make sure that a power failure cannot leave the final name with unwritten content."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
