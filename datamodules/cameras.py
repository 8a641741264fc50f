"""Pictures of a LeRobot folder, decoded on demand: mp4 videos by PyAV, inline ones by Pillow."""

from __future__ import annotations

import io
import os
from bisect import bisect_right
from collections import OrderedDict
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow.parquet as pq

from datamodules.lerobot import LeRobotDataset, LeRobotFormatError

OPEN_FILES = 8
"""Files that a camera keeps open."""

ValueT = TypeVar("ValueT")


class DecoderMissingError(ImportError):
    """The package that decodes these pictures is not installed."""


class Camera:
    """One camera of a dataset: `read` returns the picture at a frame of an episode.

    Args:
        dataset: the folder.
        key: a picture feature, for example "observation.images.top".

    Raises:
        LeRobotFormatError: the dataset has no such camera.
        DecoderMissingError: PyAV (videos) or Pillow (inline pictures) is not installed.
    """

    def __init__(self, dataset: LeRobotDataset, key: str) -> None:
        if key not in dataset.image_keys:
            raise LeRobotFormatError(
                f"{dataset.root} has no camera {key!r}; it has: "
                f"{', '.join(dataset.image_keys) or 'none'}"
            )
        self.key = key
        self._source: _Video | _Inline
        if dataset.features[key]["dtype"] == "video":
            self._source = _Video(dataset, key)
        else:
            self._source = _Inline(dataset, key)

    def read(self, position: int, frame: int) -> np.ndarray:
        """The picture `[3, height, width]` uint8 at `frame` of the episode at `position`."""
        return np.ascontiguousarray(self._source.read(position, frame).transpose(2, 0, 1))


class _Cache(Generic[ValueT]):
    """The last few open files; a process that was forked off, or unpickled, starts empty.

    Two processes must not read from one file handle: they would move each other's position.
    """

    def __init__(self) -> None:
        self._values: OrderedDict[Any, ValueT] = OrderedDict()
        self._process = os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Cache, ()

    def get(self, key: Any, make: Any) -> ValueT:
        if self._process != os.getpid():
            self._values, self._process = OrderedDict(), os.getpid()
        if key not in self._values:
            self._values[key] = make()
            if len(self._values) > OPEN_FILES:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        return self._values[key]


class _Video:
    """Frames of mp4 files in which many episodes stand one after the other."""

    def __init__(self, dataset: LeRobotDataset, key: str) -> None:
        _import_av()
        columns = [f"videos/{key}/{name}" for name in ("chunk_index", "file_index")]
        start = f"videos/{key}/from_timestamp"
        missing = [name for name in (*columns, start) if name not in dataset.episodes]
        if missing:
            raise LeRobotFormatError(
                f"the episodes of {dataset.root} have no column {', '.join(missing)}, so the "
                f"video of {key} cannot be located"
            )
        self._paths = [
            dataset.root
            / dataset.info["video_path"].format(
                video_key=key, chunk_index=int(chunk), file_index=int(file)
            )
            for chunk, file in zip(*(dataset.episodes[name] for name in columns), strict=True)
        ]
        self._starts = dataset.episodes[start]
        self._fps = dataset.fps
        self._files: _Cache[_VideoFile] = _Cache()

    def read(self, position: int, frame: int) -> np.ndarray:
        path = self._paths[position]
        file = self._files.get(path, lambda: _VideoFile(path))
        seconds = float(self._starts[position]) + frame / self._fps
        return file.read(seconds, tolerance=0.5 / self._fps)


class _VideoFile:
    """An open mp4 file, read by timestamp: seek to the key frame before, decode up to it."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; download or record the dataset again")
        self._path = path
        self._container = _import_av().open(str(path))
        self._stream = self._container.streams.video[0]

    def read(self, seconds: float, tolerance: float) -> np.ndarray:
        tick = float(self._stream.time_base)
        origin = (self._stream.start_time or 0) * tick
        self._container.seek(int((seconds + origin) / tick), stream=self._stream, backward=True)
        for frame in self._container.decode(self._stream):
            time = frame.pts * tick - origin
            if abs(time - seconds) <= tolerance:
                return np.asarray(frame.to_ndarray(format="rgb24"))
            if time > seconds:
                break
        raise LeRobotFormatError(
            f"{self._path} has no frame within {tolerance:.4f} s of {seconds:.4f} s; the video "
            "is cut off or its fps differs from meta/info.json"
        )


class _Inline:
    """PNG or JPEG bytes that stand in the rows of the data files."""

    def __init__(self, dataset: LeRobotDataset, key: str) -> None:
        self._key, self._root = key, dataset.root
        self._files = dataset.data_files
        self._locations, self._starts = dataset.locations, dataset.starts
        self._groups: _Cache[Any] = _Cache()

    def read(self, position: int, frame: int) -> np.ndarray:
        file, row = self._locations[self._starts[position] + frame].tolist()
        first, pictures = self._groups.get(*self._group_of(file, row))
        picture = pictures[row - first].as_py()
        source = self._root / picture["path"] if picture["bytes"] is None else picture["bytes"]
        return _decode_picture(source)

    def _group_of(self, file: int, row: int) -> tuple[tuple[int, int], Any]:
        ends = self._ends(file)
        group = bisect_right(ends, row)
        first = ends[group - 1] if group else 0

        def load() -> Any:
            table = pq.ParquetFile(self._files[file]).read_row_group(group, columns=[self._key])
            return first, table[self._key]

        return (file, group), load

    def _ends(self, file: int) -> list[int]:
        """Row at which each row group of a file ends."""

        def load() -> list[int]:
            metadata = pq.read_metadata(self._files[file])
            rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            return np.cumsum(rows).tolist()

        ends: list[int] = self._groups.get(file, load)
        return ends


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise DecoderMissingError(
            "this dataset stores its cameras as mp4 videos, which PyAV decodes; install it: "
            "pip install '.[sim]' (or pip install av)"
        ) from error
    return av


def _decode_picture(source: bytes | Path) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError as error:
        raise DecoderMissingError(
            "this dataset stores its cameras as pictures, which Pillow decodes; install it: "
            "pip install pillow"
        ) from error
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
        return np.asarray(picture.convert("RGB"))
