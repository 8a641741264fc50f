"""A small LeRobot v3.0 folder, laid out column by column as lerobot's own writer does it.

Built with `datasets` and pandas, which lerobot writes with, and not with our writer: two data
files, two tasks, statistics columns, episodes that change file in the middle.
"""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

FPS = 10
LENGTHS = (5, 8, 6, 4)
FILES = ((0, 1), (2, 3))  # episodes of each data file
TASKS = ("Pick the cube.", "Open the drawer.")
TASK_OF_EPISODE = (0, 1, 1, 0)
STATE_DIM, ACTION_DIM = 3, 2

FEATURES: dict[str, dict[str, Any]] = {
    "action": {"dtype": "float32", "shape": [ACTION_DIM], "names": ["a", "b"]},
    "observation.state": {
        "dtype": "float32",
        "shape": [STATE_DIM],
        "names": {"motors": ["x", "y", "z"]},
    },
    "next.reward": {"dtype": "float32", "shape": [1], "names": None},
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    "frame_index": {"dtype": "int64", "shape": [1], "names": None},
    "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    "index": {"dtype": "int64", "shape": [1], "names": None},
    "task_index": {"dtype": "int64", "shape": [1], "names": None},
}


def values(name: str, episode: int) -> np.ndarray:
    """The `[L, D]` values that feature `name` has in `episode`."""
    width = {"action": ACTION_DIM, "observation.state": STATE_DIM, "next.reward": 1}[name]
    rng = np.random.default_rng([episode, width])
    return rng.normal(size=(LENGTHS[episode], width)).astype(np.float32)


def write_reference(
    root: Path, *, converted: bool = False, extra: dict[str, dict[str, Any]] | None = None
) -> Path:
    """Write the folder.

    Args:
        root: where.
        converted: as lerobot's conversion script leaves it: variable-length lists, another column
            order, and an unnamed index in `tasks.parquet`.
        extra: further features for `meta/info.json`, for example cameras.
    """
    features = {**FEATURES, **(extra or {})}
    for file, episodes in enumerate(FILES):
        path = root / f"data/chunk-000/file-{file:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        frames = [_frames(episode) for episode in episodes]
        if converted:
            _write_as_converted(path, frames)
        else:
            _write_as_recorded(path, frames)
    _write_meta(root, features, converted)
    return root


def _frames(episode: int) -> dict[str, Any]:
    length, start = LENGTHS[episode], sum(LENGTHS[:episode])
    return {
        "action": values("action", episode),
        "observation.state": values("observation.state", episode),
        "next.reward": values("next.reward", episode)[:, 0],
        "timestamp": np.arange(length, dtype=np.float32) / FPS,
        "frame_index": np.arange(length),
        "episode_index": np.full(length, episode),
        "index": np.arange(start, start + length),
        "task_index": np.full(length, TASK_OF_EPISODE[episode]),
    }


def hugging_face_features(features: dict[str, dict[str, Any]]) -> datasets.Features:
    """The schema with which lerobot writes and loads data files."""
    return datasets.Features(
        {
            name: datasets.Value(feature["dtype"])
            if feature["shape"] == [1]
            else datasets.Sequence(datasets.Value(feature["dtype"]), length=feature["shape"][0])
            for name, feature in features.items()
        }
    )


def _write_as_recorded(path: Path, frames: list[dict[str, Any]]) -> None:
    """One row group per episode, fixed-size lists, Hugging Face metadata in the schema."""
    schema = hugging_face_features(FEATURES)
    tables = [
        datasets.Dataset.from_dict(f, features=schema).with_format("arrow")[:] for f in frames
    ]
    with pq.ParquetWriter(path, tables[0].schema, compression="snappy") as writer:
        for table in tables:
            writer.write_table(table)


def _write_as_converted(path: Path, frames: list[dict[str, Any]]) -> None:
    columns = {
        name: [row.tolist() for part in frames for row in part[name]]
        for name in reversed(frames[0])
    }
    pd.DataFrame(columns).to_parquet(path, index=False)


def _write_meta(root: Path, features: dict[str, dict[str, Any]], converted: bool) -> None:
    rows = []
    for episode, length in enumerate(LENGTHS):
        start, file = sum(LENGTHS[:episode]), int(episode in FILES[1])
        rows.append(
            {
                "episode_index": episode,
                "tasks": [TASKS[TASK_OF_EPISODE[episode]]],
                "length": length,
                "data/chunk_index": 0,
                "data/file_index": file,
                "dataset_from_index": start,
                "dataset_to_index": start + length,
                "stats/action/mean": values("action", episode).mean(0).tolist(),
                "stats/action/count": [length],
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
            }
        )
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    index = pd.Index(TASKS, name=None if converted else "task")
    pd.DataFrame({"task_index": [0, 1]}, index=index).to_parquet(root / "meta/tasks.parquet")
    info = {
        "codebase_version": "v3.0",
        "robot_type": "so101",
        "total_episodes": len(LENGTHS),
        "total_frames": sum(LENGTHS),
        "total_tasks": len(TASKS),
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": FPS,
        "splits": {"train": f"0:{len(LENGTHS)}"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": features,
    }
    (root / "meta/info.json").write_text(json.dumps(info, indent=4))


def edit_info(root: Path, **changes: Any) -> None:
    """Overwrite entries of `meta/info.json`."""
    path = root / "meta/info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_table(path: Path, **columns: Any) -> None:
    """Replace columns of a parquet file; None removes one."""
    table = pq.read_table(path, partitioning=None)
    for name, column in columns.items():
        table = table.drop_columns([name])
        if column is not None:
            table = table.append_column(name, pa.array(column))
    pq.write_table(table, path)
