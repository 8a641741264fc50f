"""Write folders in the LeRobot v3.0 format, all or nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datamodules.atomic_folder import AtomicFolder
from datamodules.lerobot import (
    CHUNK_FILE,
    DATA_PATH,
    EPISODES_FOLDER,
    INDEX_FEATURES,
    INFO_PATH,
    STATS_PATH,
    TASKS_PATH,
    VERSION,
)
from datamodules.statistics import RunningStatistics, feature_statistics

FILES_PER_CHUNK = 1000
VIDEO_FILE_SIZE_MB = 200


class LeRobotWriter:
    """Collects episodes in a hidden folder beside `path` and renames it when all are there.

    A recording that is interrupted never looks complete, and a second process waits for the first
    one: see `AtomicFolder`.

        with LeRobotWriter(path, fps=25, features=features) as writer:
            writer.add_episode({"observation.state": states, "action": actions}, task="Push.")

    Args:
        path: the folder to be; it must not exist.
        fps: frames per second.
        features: name -> {"dtype": "float32", "shape": [D], "names": [...] or None}.
        robot_type: stored in `meta/info.json`.
        file_size_mb: size at which a new data file is begun.

    Raises:
        FileExistsError: `path` exists, perhaps because the process we waited for wrote it.
        ValueError: a feature is not a vector of numbers.
    """

    def __init__(
        self,
        path: str | Path,
        fps: int,
        features: Mapping[str, Mapping[str, Any]],
        *,
        robot_type: str | None = None,
        file_size_mb: float = 100,
    ) -> None:
        self.path = Path(path)
        self.fps = fps
        self.features = {name: dict(feature) for name, feature in features.items()}
        self.robot_type = robot_type
        self.file_size_mb = file_size_mb
        self._columns = {**self.features, **INDEX_FEATURES}
        self._schema = pa.schema([(n, _arrow_type(n, f)) for n, f in self._columns.items()])
        self._tasks: dict[str, int] = {}
        self._episodes: list[dict[str, Any]] = []
        self._frames = 0
        self._statistics = {name: RunningStatistics() for name in self._columns}
        self._metadata: dict[str, Any] = {}
        self._file: pq.ParquetWriter | None = None
        self._file_index = -1
        self._target = AtomicFolder(self.path)
        self._folder = self._target.folder

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def add_episode(self, frames: Mapping[str, np.ndarray], task: str) -> None:
        """Append one episode.

        Args:
            frames: every feature as `[L, D]`.
            task: the instruction that it follows.

        Raises:
            ValueError: features are missing or unknown, lengths or widths differ, a value is not
                finite, or there is no frame.
        """
        columns = self._check(frames)
        length = len(next(iter(columns.values())))
        episode = len(self._episodes)
        numbers = np.arange(length)
        columns |= {
            "timestamp": (numbers / self.fps).astype(np.float32)[:, None],
            "frame_index": numbers[:, None],
            "episode_index": np.full((length, 1), episode),
            "index": self._frames + numbers[:, None],
            "task_index": np.full((length, 1), self._tasks.setdefault(task, len(self._tasks))),
        }
        for name, values in columns.items():
            self._statistics[name].update(values)
        self._write_frames(columns)
        chunk, file = divmod(self._file_index, FILES_PER_CHUNK)
        self._episodes.append(
            {
                "episode_index": episode,
                "tasks": [task],
                "length": length,
                "data/chunk_index": chunk,
                "data/file_index": file,
                "dataset_from_index": self._frames,
                "dataset_to_index": self._frames + length,
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
                **_flat_statistics(columns),
            }
        )
        self._frames += length

    def add_metadata(self, name: str, content: Any) -> None:
        """Store `content` as JSON in `meta/<name>`, beside what the format asks for."""
        self._metadata[f"meta/{name}"] = content

    def close(self) -> None:
        """Write the metadata and give the folder its name.

        Raises:
            ValueError: there is no episode.
            FileExistsError: `path` has appeared meanwhile; it is left as it is.
        """
        if not self._episodes:
            self.discard()
            raise ValueError(f"{self.path}: no episode was added, so there is nothing to write")
        try:
            self._write_metadata()
            self._target.commit()
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove what was written so far (nothing after `close`) and let other writers in."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._target.discard()

    def _check(self, frames: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        episode = f"episode {len(self._episodes)} of {self.path}"
        if frames.keys() != self.features.keys():
            raise ValueError(
                f"{episode} has the features {sorted(frames)}, declared are {sorted(self.features)}"
            )
        columns: dict[str, np.ndarray] = {}
        length = len(next(iter(frames.values())))
        for name, values in frames.items():
            shape = (length, int(np.prod(self.features[name]["shape"])))
            if np.shape(values) != shape or length == 0:
                raise ValueError(f"{episode}: {name} is {np.shape(values)}, should be {shape}")
            bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
            if bad.size:
                raise ValueError(f"{episode}: {name} is not finite at frame {bad[0]}")
            columns[name] = np.asarray(values, dtype=self.features[name]["dtype"])
        return columns

    def _write_frames(self, columns: Mapping[str, np.ndarray]) -> None:
        if self._file is None or self._file_size_mb() >= self.file_size_mb:
            self._next_file()
        arrays = [_arrow_array(columns[field.name], field.type) for field in self._schema]
        assert self._file is not None
        self._file.write_table(pa.Table.from_arrays(arrays, schema=self._schema))

    def _file_size_mb(self) -> float:
        return self._data_path().stat().st_size / 2**20

    def _data_path(self) -> Path:
        chunk, file = divmod(self._file_index, FILES_PER_CHUNK)
        return self._folder / DATA_PATH.format(chunk_index=chunk, file_index=file)

    def _next_file(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file_index += 1
        self._data_path().parent.mkdir(parents=True, exist_ok=True)
        self._file = pq.ParquetWriter(self._data_path(), self._schema, compression="snappy")

    def _write_metadata(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        episodes = f"{EPISODES_FOLDER}/{CHUNK_FILE}.parquet".format(chunk_index=0, file_index=0)
        (self._folder / episodes).parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self._episodes), self._folder / episodes)
        pq.write_table(_tasks_table(self._tasks), self._folder / TASKS_PATH)
        statistics = {
            name: {key: value.tolist() for key, value in running.result().items()}
            for name, running in self._statistics.items()
        }
        documents = {INFO_PATH: self._info(), STATS_PATH: statistics, **self._metadata}
        for name, content in documents.items():
            text = json.dumps(content, indent=4, ensure_ascii=False)
            (self._folder / name).write_text(text, encoding="utf-8")

    def _info(self) -> dict[str, Any]:
        return {
            "codebase_version": VERSION,
            "robot_type": self.robot_type,
            "total_episodes": len(self._episodes),
            "total_frames": self._frames,
            "total_tasks": len(self._tasks),
            "chunks_size": FILES_PER_CHUNK,
            "data_files_size_in_mb": int(max(self.file_size_mb, 1)),
            "video_files_size_in_mb": VIDEO_FILE_SIZE_MB,
            "fps": self.fps,
            "splits": {"train": f"0:{len(self._episodes)}"},
            "data_path": DATA_PATH,
            "video_path": None,
            "features": self._columns,
        }


def _arrow_type(name: str, feature: Mapping[str, Any]) -> pa.DataType:
    """Scalar for shape [1], fixed-size list for longer vectors: what lerobot itself stores."""
    shape, dtype = list(feature["shape"]), feature["dtype"]
    if dtype in ("video", "image", "string") or len(shape) != 1 or "/" in name:
        raise ValueError(
            f"feature {name!r} is {dtype} of shape {shape}; this writer stores vectors of numbers, "
            "and names have no '/'"
        )
    scalar = pa.from_numpy_dtype(np.dtype(dtype))
    return scalar if shape == [1] else pa.list_(scalar, shape[0])


def _arrow_array(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    flat = np.ascontiguousarray(values).reshape(-1)
    if not pa.types.is_fixed_size_list(kind):
        return pa.array(flat, kind)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat, kind.value_type), type=kind)


def _flat_statistics(columns: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    return {
        f"stats/{name}/{key}": value.tolist()
        for name, values in columns.items()
        for key, value in feature_statistics([values]).items()
    }


def _tasks_table(tasks: Mapping[str, int]) -> pa.Table:
    """A pandas frame whose index is the instruction, which is how lerobot looks tasks up."""
    table = pa.table(
        {"task_index": pa.array(list(tasks.values()), pa.int64()), "task": list(tasks)}
    )
    description = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [
            {
                "name": name,
                "field_name": name,
                "pandas_type": kind,
                "numpy_type": numpy_kind,
                "metadata": None,
            }
            for name, kind, numpy_kind in (
                ("task_index", "int64", "int64"),
                ("task", "unicode", "object"),
            )
        ],
    }
    return table.replace_schema_metadata({"pandas": json.dumps(description)})
