"""A small LeRobot folder with pictures: a coloured block, and actions that reach for it."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from datamodules.lerobot_writer import LeRobotWriter

CAMERA = "observation.images.top"
TASKS = ("Reach the red block.", "Reach the blue block.")
STATE, ACTION, SIDE = 3, 2, 32


def write_camera_folder(
    root: Path, episodes: int = 6, frames: int = 12, cameras: tuple[str, ...] = (CAMERA,)
) -> Path:
    """Write it: the block is seen by the cameras only, the state is where the arm is.

    Args:
        root: where.
        episodes: their number; tasks alternate.
        frames: per episode.
        cameras: features with a picture each, all the same.
    """
    features = {
        "observation.state": {"dtype": "float32", "shape": [STATE], "names": None},
        "action": {"dtype": "float32", "shape": [ACTION], "names": None},
    }
    pictures = []
    with LeRobotWriter(root, 10, features) as writer:
        for episode in range(episodes):
            rng = np.random.default_rng(episode)
            block, arm = rng.uniform(-1, 1, 2), rng.uniform(-1, 1, 2)
            states, actions = [], []
            for _ in range(frames):
                action = np.clip(block - arm, -0.2, 0.2)
                states.append([*arm, 1.0])
                actions.append(action)
                pictures.append(_png(block, episode % 2))
                arm = arm + action
            writer.add_episode(
                {"observation.state": np.array(states), "action": np.array(actions)},
                task=TASKS[episode % 2],
            )
    _add_pictures(root, pictures, cameras)
    return root


def _png(block: np.ndarray, colour: int) -> dict[str, object]:
    picture = np.full((SIDE, SIDE + 8, 3), 40, np.uint8)
    column, row = ((block + 1) / 2 * (SIDE - 8)).astype(int)
    picture[row : row + 8, column : column + 8] = ((230, 30, 30), (30, 30, 230))[colour]
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def _add_pictures(root: Path, pictures: list[dict[str, object]], cameras: tuple[str, ...]) -> None:
    path = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path, partitioning=None)
    info = json.loads((root / "meta/info.json").read_text())
    for camera in cameras:
        table = table.append_column(camera, pa.array(pictures))
        info["features"][camera] = {
            "dtype": "image",
            "shape": [SIDE, SIDE + 8, 3],
            "names": ["height", "width", "channels"],
        }
    pq.write_table(table, path)
    (root / "meta/info.json").write_text(json.dumps(info))
