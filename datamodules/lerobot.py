"""Folders in the LeRobot v3.0 format: what is in them, and their numbers as arrays.

    meta/info.json                           version, fps, features, path templates
    meta/tasks.parquet                       instruction -> task_index
    meta/episodes/chunk-000/file-000.parquet one row per episode: length, and where its data lies
    data/chunk-000/file-000.parquet          one row per frame, many episodes per file
    videos/<camera>/chunk-000/file-000.mp4   many episodes per file, located by timestamps

Only numpy and pyarrow are needed; `datamodules.cameras` decodes the pictures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

VERSION = "v3.0"
INFO_PATH = "meta/info.json"
STATS_PATH = "meta/stats.json"
TASKS_PATH = "meta/tasks.parquet"
EPISODES_FOLDER = "meta/episodes"
CHUNK_FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
DATA_PATH = f"data/{CHUNK_FILE}.parquet"

INDEX_FEATURES: dict[str, dict[str, Any]] = {
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    "frame_index": {"dtype": "int64", "shape": [1], "names": None},
    "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    "index": {"dtype": "int64", "shape": [1], "names": None},
    "task_index": {"dtype": "int64", "shape": [1], "names": None},
}
"""What every frame has beside the features of its robot."""

_ORDER = ("episode_index", "frame_index", "task_index")


class LeRobotFormatError(ValueError):
    """A folder is not what the LeRobot v3.0 format says it should be."""


class LeRobotDataset:
    """The numeric columns of a LeRobot folder as arrays, ordered by episode and frame.

    Args:
        root: the folder that has `meta/` and `data/` in it.
        columns: features to load; every other column stays on disk.

    Attributes:
        columns: feature -> `[N, D]` float32.
        task_index: `[N]` int64, key of `tasks`.
        frame_index: `[N]` int64, counted from 0 in every episode.
        episode_index: `[E]` int64, the number that each episode has in the folder.
        starts: `[E]` int64, the row at which each episode begins.
        lengths: `[E]` int64, frames per episode.
        locations: `[N, 2]` int64, each frame's data file (position in `data_files`) and row in it.

    Raises:
        FileNotFoundError: no such folder, or a file that the metadata names is missing.
        LeRobotFormatError: another version, a missing column, other dimensions than declared,
            numbers that are not finite, missing frames, or no episode at all.
    """

    def __init__(
        self, root: str | Path, columns: Sequence[str] = ("observation.state", "action")
    ) -> None:
        self.root = Path(root)
        self.info = read_info(self.root)
        self.features: dict[str, dict[str, Any]] = self.info["features"]
        self.fps = float(self.info["fps"])
        self.episodes = read_episodes(self.root)
        self.data_files = self._find_data_files()
        self._load(list(columns))
        self._check_episodes()
        for name in columns:
            self._check_finite(name)

    @cached_property
    def tasks(self) -> dict[int, str]:
        """Instruction of every task index; empty if the folder has none."""
        return read_tasks(self.root) if (self.root / TASKS_PATH).is_file() else {}

    @property
    def image_keys(self) -> list[str]:
        """Features that are pictures, as videos or inline."""
        return [key for key, f in self.features.items() if f["dtype"] in ("video", "image")]

    def episode(self, position: int, name: str) -> np.ndarray:
        """Feature `name` of the episode at `position` (0 to E - 1), `[L, D]`, a view."""
        start = self.starts[position]
        return self.columns[name][start : start + self.lengths[position]]

    def width(self, name: str) -> int:
        """Number of values per frame that `meta/info.json` declares for a feature.

        Raises:
            LeRobotFormatError: no such feature, or it is not numeric.
        """
        numeric = {
            key: feature
            for key, feature in self.features.items()
            if feature["dtype"] not in ("video", "image", "string", "language")
        }
        if name not in numeric:
            raise LeRobotFormatError(
                f"{self.root} has no numeric feature {name!r}; {INFO_PATH} declares: "
                f"{', '.join(numeric)}"
            )
        return int(np.prod(numeric[name]["shape"]))

    def names(self, name: str) -> list[str] | None:
        """Names of a feature's dimensions, if `meta/info.json` has one for each."""
        names: Any = self.features[name].get("names")
        if isinstance(names, Mapping):  # grouped, such as {"motors": [...]}
            names = [item for group in names.values() for item in group]
        complete = isinstance(names, list) and len(names) == self.width(name)
        return [str(item) for item in names] if complete else None

    def _find_data_files(self) -> list[Path]:
        chunks = zip(
            self.episodes["data/chunk_index"], self.episodes["data/file_index"], strict=True
        )
        files = [
            self.root / self.info["data_path"].format(chunk_index=int(chunk), file_index=int(file))
            for chunk, file in sorted(set(chunks))
        ]
        for path in files:
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path} is missing although {EPISODES_FOLDER} names it; the folder is "
                    "incomplete, download or record it again"
                )
        return files

    def _load(self, names: list[str]) -> None:
        widths = {name: self.width(name) for name in names}
        rows = [_row_count(path, [*names, *_ORDER]) for path in self.data_files]
        total, end = sum(rows), 0
        columns = {name: np.empty((total, width), np.float32) for name, width in widths.items()}
        order = {name: np.empty((total, 1), np.int64) for name in _ORDER}
        locations = np.empty((total, 2), np.int64)
        for file, (path, count) in enumerate(zip(self.data_files, rows, strict=True)):
            start, end = end, end + count
            # A feature may be one of the columns of the order, and is read once then.
            table = pq.read_table(path, columns=[*{*names, *_ORDER}], partitioning=None)
            for targets in (columns, order):
                for name, target in targets.items():
                    target[start:end] = _to_array(table[name], target.shape[1], path, name)
            locations[start:end] = np.stack([np.full(count, file), np.arange(count)], axis=1)
        episode, frame = order["episode_index"][:, 0], order["frame_index"][:, 0]
        sort: Any = np.lexsort((frame, episode))
        if np.array_equal(sort, np.arange(total)):
            sort = slice(None)  # views instead of copies
        self.columns = {name: column[sort] for name, column in columns.items()}
        self.locations = locations[sort]
        self.frame_index, self.task_index = frame[sort], order["task_index"][sort, 0]
        self.episode_index, self.starts, self.lengths = np.unique(
            episode[sort], return_index=True, return_counts=True
        )

    def _check_episodes(self) -> None:
        if len(self.episode_index) == 0:
            raise LeRobotFormatError(_empty(self.root))
        declared = dict(
            zip(
                self.episodes["episode_index"].tolist(),
                self.episodes["length"].tolist(),
                strict=True,
            )
        )
        found = dict(zip(self.episode_index.tolist(), self.lengths.tolist(), strict=True))
        for episode in sorted(declared.keys() | found.keys()):
            if declared.get(episode, 0) != found.get(episode, 0):
                raise LeRobotFormatError(
                    f"episode {episode} of {self.root} has {found.get(episode, 0)} frames in "
                    f"data/ but {declared.get(episode, 0)} in {EPISODES_FOLDER}; the folder is "
                    "damaged or incomplete, download or record it again"
                )
        expected = np.arange(len(self.frame_index)) - np.repeat(self.starts, self.lengths)
        wrong = np.flatnonzero(self.frame_index != expected)
        if wrong.size:
            episode, _ = self._place(int(wrong[0]))
            raise LeRobotFormatError(
                f"the frames of episode {episode} of {self.root} are not numbered 0, 1, 2, ...: "
                f"frame {expected[wrong[0]]} is missing or doubled"
            )

    def _check_finite(self, name: str) -> None:
        bad = np.flatnonzero(~np.isfinite(self.columns[name]).all(axis=1))
        if bad.size:
            episode, frame = self._place(int(bad[0]))
            raise LeRobotFormatError(
                f"{name} has NaN or infinite values in {bad.size} frames of {self.root}, first in "
                f"episode {episode}, frame {frame}; repair or remove these episodes"
            )

    def _place(self, row: int) -> tuple[int, int]:
        position = int(np.searchsorted(self.starts, row, side="right")) - 1
        return int(self.episode_index[position]), row - int(self.starts[position])


def read_info(root: Path) -> dict[str, Any]:
    """`meta/info.json` of a folder, checked for version and features.

    Raises:
        FileNotFoundError: there is no such folder, or it has no `meta/info.json`.
        LeRobotFormatError: another version of the format.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"no folder {root}; give the path of a LeRobot {VERSION} dataset (--data.root PATH)"
        )
    path = root / INFO_PATH
    if not path.is_file():
        raise FileNotFoundError(
            f"{root} is not a LeRobot {VERSION} dataset: it has no {INFO_PATH}; "
            "give the folder that contains meta/ and data/"
        )
    info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    version = str(info.get("codebase_version"))
    if version.startswith("v2"):
        raise LeRobotFormatError(
            f"{root} is in LeRobot format {version}, this reads {VERSION}; convert it where "
            "lerobot is installed: python -m lerobot.scripts.convert_dataset_v21_to_v30 "
            "--repo-id=<user>/<dataset> (in older releases it is in lerobot.datasets.v30)"
        )
    if not version.startswith("v3."):
        raise LeRobotFormatError(f"{root} is in LeRobot format {version}, this reads {VERSION}")
    missing = [key for key in ("fps", "features", "data_path") if key not in info]
    if missing:
        raise LeRobotFormatError(f"{path} lacks {', '.join(missing)}")
    return info


def read_tasks(root: Path) -> dict[int, str]:
    """Instruction of every task index.

    lerobot stores a pandas frame with the instruction as its index, which is a column named
    `task` or, from older versions, `__index_level_0__`.
    """
    table = pq.read_table(root / TASKS_PATH, partitioning=None)
    text = next(name for name in table.column_names if name != "task_index")
    return dict(zip(table["task_index"].to_pylist(), table[text].to_pylist(), strict=True))


def read_episodes(root: Path) -> dict[str, np.ndarray]:
    """The numeric columns of the episode table by name, `[E]` each, ordered by `episode_index`.

    Raises:
        LeRobotFormatError: no episodes, a needed column is missing, or an episode stands twice.
    """
    parts: list[dict[str, np.ndarray]] = []
    for path in sorted((root / EPISODES_FOLDER).glob("*/*.parquet")):
        schema = pq.read_schema(path)
        _require(("episode_index", "length", "data/chunk_index", "data/file_index"), schema, path)
        names = [field.name for field in schema if _is_number(field.type)]
        table = pq.read_table(path, columns=names, partitioning=None)
        parts.append({name: table[name].to_numpy() for name in names})
    if sum(len(part["episode_index"]) for part in parts) == 0:
        raise LeRobotFormatError(_empty(root))
    shared = set.intersection(*(set(part) for part in parts))
    columns = {name: np.concatenate([part[name] for part in parts]) for name in sorted(shared)}
    order = np.argsort(columns["episode_index"], kind="stable")
    order = order[columns["length"][order] > 0]
    columns = {name: column[order] for name, column in columns.items()}
    twice = np.flatnonzero(np.diff(columns["episode_index"]) == 0)
    if twice.size:
        raise LeRobotFormatError(
            f"episode {columns['episode_index'][twice[0]]} stands twice in "
            f"{root / EPISODES_FOLDER}; remove the stale file"
        )
    return columns


def _empty(root: Path) -> str:
    return f"{root} has no episodes; record or download some first"


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _require(names: Sequence[str], schema: pa.Schema, path: Path) -> None:
    missing = [name for name in names if name not in schema.names]
    if missing:
        raise LeRobotFormatError(
            f"{path} has no column {', '.join(missing)}; it has: {', '.join(schema.names)}"
        )


def _row_count(path: Path, names: Sequence[str]) -> int:
    file = pq.ParquetFile(path)
    _require(names, file.schema_arrow, path)
    return int(file.metadata.num_rows)


def _to_array(column: pa.ChunkedArray, width: int, path: Path, name: str) -> np.ndarray:
    """Rows of a scalar or (nested, fixed or variable) list column as `[N, width]`."""
    parts = [_part_to_array(part, width, path, name) for part in column.chunks]
    return np.concatenate(parts) if parts else np.empty((0, width))


def _part_to_array(values: pa.Array, width: int, path: Path, name: str) -> np.ndarray:
    rows = len(values)
    while not _is_number(values.type) and not pa.types.is_boolean(values.type):
        if isinstance(values.type, pa.BaseExtensionType):
            values = values.storage
        elif pa.types.is_nested(values.type) and hasattr(values.type, "value_type"):
            _check_lengths(values, width, path, name)
            values = values.flatten()
        else:
            raise LeRobotFormatError(f"{name} in {path} is {values.type}, not numeric")
    if len(values) != rows * width:
        raise LeRobotFormatError(_wrong_width(name, path, f"{len(values) / max(rows, 1):g}", width))
    return np.asarray(values.to_numpy(zero_copy_only=False)).reshape(rows, width)


def _check_lengths(values: pa.Array, width: int, path: Path, name: str) -> None:
    """Ragged rows must not pass because their total length happens to fit."""
    fixed = pa.types.is_fixed_size_list(values.type)
    if fixed or not _is_number(values.type.value_type):
        return
    lengths = np.diff(values.offsets.to_numpy())
    wrong = np.flatnonzero(lengths != width)
    if wrong.size:
        raise LeRobotFormatError(_wrong_width(name, path, str(lengths[wrong[0]]), width))


def _wrong_width(name: str, path: Path, found: str, width: int) -> str:
    return (
        f"{name} has {found} values per frame in {path}, but {INFO_PATH} declares {width}; all "
        "files of a dataset must have the same dimensions"
    )
