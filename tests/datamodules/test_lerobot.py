"""Reading LeRobot folders: against a folder laid out as lerobot's own writer does, and errors."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from lerobot_reference import (
    ACTION_DIM,
    FEATURES,
    LENGTHS,
    TASK_OF_EPISODE,
    TASKS,
    edit_info,
    edit_table,
    values,
    write_reference,
)

from datamodules.lerobot import LeRobotDataset, LeRobotFormatError

FIRST_FILE = "data/chunk-000/file-000.parquet"
EPISODES_FILE = "meta/episodes/chunk-000/file-000.parquet"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_reference(tmp_path / "set")


@pytest.mark.parametrize("converted", [False, True])
def test_reads_what_lerobot_lays_out(tmp_path: Path, converted: bool) -> None:
    folder = write_reference(tmp_path / "set", converted=converted)
    data = LeRobotDataset(folder, ("observation.state", "action", "next.reward"))
    assert data.lengths.tolist() == list(LENGTHS)
    assert data.tasks == dict(enumerate(TASKS))
    assert data.fps == 10
    for episode in range(len(LENGTHS)):
        for name in data.columns:
            np.testing.assert_array_equal(data.episode(episode, name), values(name, episode))
        rows = slice(data.starts[episode], data.starts[episode] + data.lengths[episode])
        assert set(data.task_index[rows].tolist()) == {TASK_OF_EPISODE[episode]}
    assert data.names("observation.state") == ["x", "y", "z"]
    assert data.names("next.reward") is None


def test_rows_in_another_order_are_sorted_by_episode_and_frame(folder: Path) -> None:
    path = folder / FIRST_FILE
    table = pq.read_table(path, partitioning=None)
    pq.write_table(table.take(np.random.default_rng(0).permutation(len(table))), path)
    data = LeRobotDataset(folder)
    for episode in range(len(LENGTHS)):
        np.testing.assert_array_equal(data.episode(episode, "action"), values("action", episode))
    assert np.unique(data.locations, axis=0).shape == (sum(LENGTHS), 2)


def test_needs_neither_torch_nor_lightning_nor_gymnasium() -> None:
    code = (
        "import sys, datamodules.lerobot, datamodules.statistics, datamodules.simulations\n"
        "heavy = {'torch', 'lightning', 'gymnasium', 'mujoco'} & set(sys.modules)\n"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        LeRobotDataset(tmp_path / "nowhere")


def test_folder_without_meta_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="give the folder that contains meta/"):
        LeRobotDataset(tmp_path)


def test_version_2_1_says_how_to_convert(folder: Path) -> None:
    edit_info(folder, codebase_version="v2.1")
    with pytest.raises(LeRobotFormatError, match=r"v2\.1.*convert_dataset_v21_to_v30"):
        LeRobotDataset(folder)


def test_unknown_version_is_named(folder: Path) -> None:
    edit_info(folder, codebase_version="v4.0")
    with pytest.raises(LeRobotFormatError, match=r"v4\.0, this reads v3\.0"):
        LeRobotDataset(folder)


def test_undeclared_feature_lists_the_declared_ones(folder: Path) -> None:
    with pytest.raises(LeRobotFormatError, match="'observation.effort'.*observation.state"):
        LeRobotDataset(folder, ("observation.effort",))


def test_missing_column_names_the_file(folder: Path) -> None:
    edit_table(folder / FIRST_FILE, action=None)
    with pytest.raises(LeRobotFormatError, match="file-000.parquet has no column action"):
        LeRobotDataset(folder)


def test_missing_episode_column_is_named(folder: Path) -> None:
    edit_table(folder / EPISODES_FILE, length=None)
    with pytest.raises(LeRobotFormatError, match="has no column length"):
        LeRobotDataset(folder)


def test_missing_data_file_is_named(folder: Path) -> None:
    (folder / FIRST_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="file-000.parquet is missing"):
        LeRobotDataset(folder)


def test_action_dim_other_than_declared(folder: Path) -> None:
    features = {**FEATURES, "action": {**FEATURES["action"], "shape": [7]}}
    edit_info(folder, features=features)
    with pytest.raises(LeRobotFormatError, match="2 values per frame.*file-000.*declares 7"):
        LeRobotDataset(folder)


def test_action_dim_that_differs_between_files(folder: Path) -> None:
    rows = pq.read_metadata(folder / "data/chunk-000/file-001.parquet").num_rows
    edit_table(folder / "data/chunk-000/file-001.parquet", action=[[0.0] * 3] * rows)
    with pytest.raises(LeRobotFormatError, match="3 values per frame in .*file-001.*declares 2"):
        LeRobotDataset(folder)


def test_ragged_actions_whose_total_fits(folder: Path) -> None:
    rows = sum(LENGTHS[:2])
    ragged = [[0.0] * ACTION_DIM for _ in range(rows)]
    ragged[3], ragged[4] = [0.0] * (ACTION_DIM - 1), [0.0] * (ACTION_DIM + 1)
    edit_table(folder / FIRST_FILE, action=ragged)
    with pytest.raises(LeRobotFormatError, match="action has 1 values per frame"):
        LeRobotDataset(folder)


def test_nan_actions_name_episode_and_frame(folder: Path) -> None:
    rows = sum(LENGTHS[:2])
    actions = np.zeros((rows, ACTION_DIM))
    actions[LENGTHS[0] + 2, 1] = np.nan
    edit_table(folder / FIRST_FILE, action=actions.tolist())
    with pytest.raises(LeRobotFormatError, match="action has NaN.*episode 1, frame 2"):
        LeRobotDataset(folder)


def test_lost_frames_name_the_episode(folder: Path) -> None:
    table = pq.read_table(folder / FIRST_FILE, partitioning=None)
    pq.write_table(table.slice(0, len(table) - 1), folder / FIRST_FILE)
    with pytest.raises(LeRobotFormatError, match="episode 1 .* has 7 frames in data/ but 8"):
        LeRobotDataset(folder)


def test_doubled_frame_is_named(folder: Path) -> None:
    table = pq.read_table(folder / FIRST_FILE, partitioning=None)
    numbers = table["frame_index"].to_pylist()
    numbers[3] = 2
    edit_table(folder / FIRST_FILE, frame_index=numbers)
    with pytest.raises(LeRobotFormatError, match="frames of episode 0 .* frame 3 is missing"):
        LeRobotDataset(folder)


def test_episode_listed_twice_is_named(folder: Path) -> None:
    stale = folder / "meta/episodes/chunk-000/file-001.parquet"
    stale.write_bytes((folder / EPISODES_FILE).read_bytes())
    with pytest.raises(LeRobotFormatError, match="episode 0 stands twice"):
        LeRobotDataset(folder)


def test_empty_dataset_is_named(folder: Path) -> None:
    table = pq.read_table(folder / EPISODES_FILE, partitioning=None)
    pq.write_table(table.slice(0, 0), folder / EPISODES_FILE)
    with pytest.raises(LeRobotFormatError, match="has no episodes"):
        LeRobotDataset(folder)
