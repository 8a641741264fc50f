"""Writing LeRobot folders: round trip, what lerobot needs, all or nothing."""

import json
import threading
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from lerobot_reference import hugging_face_features

from datamodules.lerobot import LeRobotDataset
from datamodules.lerobot_writer import LeRobotWriter

FEATURES = {
    "observation.state": {"dtype": "float32", "shape": [3], "names": ["x", "y", "goal_x"]},
    "action": {"dtype": "float32", "shape": [2], "names": None},
    "next.reward": {"dtype": "float32", "shape": [1], "names": None},
}
LENGTHS, TASKS = (4, 7, 5), ("Push.", "Lift.", "Push.")


def episode(number: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    shapes = {"observation.state": 3, "action": 2, "next.reward": 1}
    return {
        name: rng.normal(size=(LENGTHS[number], width)).astype(np.float32)
        for name, width in shapes.items()
    }


def write(path: Path, **options: float) -> Path:
    with LeRobotWriter(path, fps=20, features=FEATURES, **options) as writer:
        for number, task in enumerate(TASKS):
            writer.add_episode(episode(number), task)
        writer.add_metadata("recording.json", {"by": "test"})
    return path


@pytest.mark.parametrize("file_size_mb", [100, 1e-6])
def test_reader_returns_what_the_writer_got(tmp_path: Path, file_size_mb: float) -> None:
    path = write(tmp_path / "set", file_size_mb=file_size_mb)
    assert len(list(path.glob("data/*/*.parquet"))) == (1 if file_size_mb == 100 else 3)
    data = LeRobotDataset(path, tuple(FEATURES))
    assert data.lengths.tolist() == list(LENGTHS)
    for number, task in enumerate(TASKS):
        for name, expected in episode(number).items():
            np.testing.assert_array_equal(data.episode(number, name), expected)
        assert data.tasks[int(data.task_index[data.starts[number]])] == task
    assert data.names("observation.state") == ["x", "y", "goal_x"]
    assert json.loads((path / "meta/recording.json").read_text()) == {"by": "test"}


def test_files_load_the_way_lerobot_loads_them(tmp_path: Path) -> None:
    path = write(tmp_path / "set")
    info = json.loads((path / "meta/info.json").read_text())
    files = sorted(str(file) for file in path.glob("data/*/*.parquet"))
    frames = datasets.Dataset.from_parquet(
        files, features=hugging_face_features(info["features"]), cache_dir=str(tmp_path / "cache")
    )
    assert len(frames) == info["total_frames"] == sum(LENGTHS)
    assert frames["index"][:] == list(range(sum(LENGTHS)))
    np.testing.assert_allclose(frames["timestamp"][4:7], np.arange(3) / 20, rtol=1e-6)
    np.testing.assert_array_equal(np.array(frames["action"][:4]), episode(0)["action"])
    tasks = pd.read_parquet(path / "meta/tasks.parquet")
    assert [int(tasks.loc[task].task_index) for task in ("Push.", "Lift.")] == [0, 1]
    episodes = datasets.Dataset.from_parquet(
        [str(file) for file in path.glob("meta/episodes/*/*.parquet")],
        cache_dir=str(tmp_path / "cache"),
    )
    assert [row["tasks"] for row in episodes] == [[task] for task in TASKS]
    assert [row["dataset_to_index"] for row in episodes] == np.cumsum(LENGTHS).tolist()


def test_statistics_files_match_numpy(tmp_path: Path) -> None:
    path = write(tmp_path / "set")
    rows = np.concatenate([episode(number)["action"] for number in range(3)])
    stats = json.loads((path / "meta/stats.json").read_text())["action"]
    np.testing.assert_allclose(stats["mean"], rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["std"], rows.std(0), rtol=1e-5)
    np.testing.assert_allclose(stats["q99"], np.quantile(rows, 0.99, axis=0), rtol=1e-5)
    assert stats["count"] == [sum(LENGTHS)]
    episodes = pd.read_parquet(path / "meta/episodes/chunk-000/file-000.parquet")
    np.testing.assert_allclose(
        episodes["stats/action/max"][1], episode(1)["action"].max(0), rtol=1e-6
    )


def test_nothing_has_the_final_name_before_close(tmp_path: Path) -> None:
    with LeRobotWriter(tmp_path / "set", 20, FEATURES) as writer:
        writer.add_episode(episode(0), "Push.")
        assert not (tmp_path / "set").exists()
    assert (tmp_path / "set/meta/info.json").exists()


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="simulator crashed"),
        LeRobotWriter(tmp_path / "set", 20, FEATURES) as writer,
    ):
        writer.add_episode(episode(0), "Push.")
        raise RuntimeError("simulator crashed")
    assert [path.name for path in tmp_path.iterdir()] == [".set.lock"]


def test_leftovers_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    leftover = tmp_path / ".set.partial-killed"
    (leftover / "data").mkdir(parents=True)
    write(tmp_path / "set")
    assert not leftover.exists()


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with pytest.raises(FileExistsError, match="remove it or write to another folder"):
        LeRobotWriter(tmp_path / "set", 20, FEATURES)
    assert list((tmp_path / "set").iterdir()) == []


def test_second_writer_waits_and_finds_the_first_ones_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes: list[str] = []

    def second() -> None:
        try:
            LeRobotWriter(tmp_path / "set", 20, FEATURES)
        except FileExistsError:
            outcomes.append("exists")

    with LeRobotWriter(tmp_path / "set", 20, FEATURES) as writer:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(timeout=0.3)
        assert thread.is_alive() and outcomes == []
        writer.add_episode(episode(0), "Push.")
    thread.join(timeout=10)
    assert outcomes == ["exists"]
    assert "waiting for another process" in capsys.readouterr().out


def test_a_folder_that_appears_meanwhile_wins(tmp_path: Path) -> None:
    with (
        pytest.raises(FileExistsError, match="written by somebody else"),
        LeRobotWriter(tmp_path / "set", 20, FEATURES) as writer,
    ):
        writer.add_episode(episode(0), "Push.")
        (tmp_path / "set").mkdir()
        (tmp_path / "set/theirs").touch()
    assert (tmp_path / "set/theirs").exists()
    assert not list(tmp_path.glob(".set.partial-*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": None}, "declared are"),
        ({"action": np.zeros((4, 3))}, r"action is \(4, 3\), should be \(4, 2\)"),
        ({"action": np.zeros((3, 2))}, r"action is \(3, 2\), should be \(4, 2\)"),
        ({"action": np.full((4, 2), np.nan)}, "action is not finite at frame 0"),
    ],
)
def test_bad_episodes_are_refused(
    tmp_path: Path, change: dict[str, np.ndarray | None], message: str
) -> None:
    frames = {k: v for k, v in {**episode(0), **change}.items() if v is not None}
    with (
        pytest.raises(ValueError, match=message),
        LeRobotWriter(tmp_path / "set", 20, FEATURES) as writer,
    ):
        writer.add_episode(frames, "Push.")


def test_no_episode_is_an_error_and_no_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="no episode was added"),
        LeRobotWriter(tmp_path / "set", 20, FEATURES),
    ):
        pass
    assert not (tmp_path / "set").exists()


def test_pictures_are_refused(tmp_path: Path) -> None:
    features = {"observation.images.top": {"dtype": "video", "shape": [8, 8, 3], "names": None}}
    with pytest.raises(ValueError, match="stores vectors of numbers"):
        LeRobotWriter(tmp_path / "set", 20, features)
