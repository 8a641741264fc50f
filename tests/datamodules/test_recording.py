"""Recordings: the recipe, the same for any number of workers, complete or not there at all."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from datamodules.lerobot import LeRobotDataset
from datamodules.recording import FRAMES_AFTER_SUCCESS, RecordingConfig, record
from datamodules.simulations import SIMULATIONS, get_simulation

pytest.importorskip("gymnasium_robotics")

ROOT = Path(__file__).parents[2]
SLOWED_DOWN = """
import sys, time
from datamodules import recording
from datamodules.lerobot_writer import LeRobotWriter

class Slow(LeRobotWriter):
    def add_episode(self, *args, **options):
        super().add_episode(*args, **options)
        time.sleep(0.05)

if __name__ == "__main__":
    recording.LeRobotWriter = Slow
    config = recording.RecordingConfig("FetchReach", episodes=60)
    recording.record(config, sys.argv[1], workers=int(sys.argv[2]))
"""


class Spy:
    """An environment that remembers the actions it is given."""

    def __init__(self, env: object) -> None:
        self._env = env
        self.executed: list[np.ndarray] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._env, name)

    def step(self, action: np.ndarray) -> object:
        self.executed.append(np.array(action))
        return self._env.step(action)


def test_labels_are_clean_and_half_of_the_executed_actions_noisy() -> None:
    from datamodules.recording import record_episode

    simulation = get_simulation("PointMaze")
    env = Spy(simulation.make())
    config = RecordingConfig("PointMaze", noise=0.2)
    episodes, executed = [], []
    for number in range(12):
        env.executed.clear()
        episodes.append(record_episode(config, simulation, env, number))
        executed.append(np.stack(env.executed[:: simulation.action_repeat]))
    stored = np.concatenate([episode.actions for episode in episodes])
    difference = np.concatenate(executed) - stored
    noisy = (difference != 0).any(axis=1)
    assert 0.4 < noisy.mean() < 0.6
    inside = np.abs(np.concatenate(executed)) < 1  # not clipped
    assert 0.1 < difference[noisy & inside.all(axis=1)].std() < 0.25
    # The stored action is what the expert does in the stored state.
    expert = simulation.expert(env)
    for episode in episodes:
        for state, action in zip(episode.states, episode.actions, strict=True):
            raw = {"observation": state[:4], "desired_goal": state[4:6]}
            np.testing.assert_allclose(expert.act(raw), action, atol=1e-4)


def test_without_noise_the_expert_acts_as_stored() -> None:
    from datamodules.recording import record_episode

    simulation = get_simulation("FetchReach")
    env = Spy(simulation.make())
    episode = record_episode(RecordingConfig("FetchReach", noise=0.0), simulation, env, 0)
    np.testing.assert_array_equal(np.stack(env.executed), episode.actions)


def test_frames_end_12_after_the_first_success() -> None:
    from datamodules.recording import record_episode

    simulation = get_simulation("FetchReach")
    env = simulation.make()
    for number in range(5):
        episode = record_episode(RecordingConfig("FetchReach"), simulation, env, number)
        distance = np.linalg.norm(episode.states[:, :3] - episode.states[:, -3:], axis=1)
        # The gripper's place in state t + 1 is what decided success at frame t.
        first = int(np.flatnonzero(distance[1:] < 0.05)[0])
        assert episode.success
        assert len(episode.states) == first + 1 + FRAMES_AFTER_SUCCESS


def read_all(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()
    }


def test_one_and_two_workers_record_the_same_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = RecordingConfig("PointMaze", episodes=10)
    folders = [record(config, tmp_path / str(workers), workers) for workers in (1, 2)]
    assert "recorded 10 episodes" in capsys.readouterr().out
    first, second = (read_all(folder) for folder in folders)
    assert first.keys() == second.keys() and len(first) == 6
    for name in first:
        assert first[name] == second[name], name


def test_a_recording_is_a_lerobot_folder_that_says_how_it_was_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = record(RecordingConfig("FetchReach", episodes=5, noise=0.1, seed=3), tmp_path, workers=1)
    data = LeRobotDataset(path)
    assert len(data.lengths) == 5
    assert data.names("action") == ["move_x", "move_y", "move_z", "fingers"]
    assert data.tasks == {0: SIMULATIONS["FetchReach"].task}
    about = json.loads((path / "meta/recording.json").read_text())
    assert about["settings"]["noise"] == 0.1 and about["settings"]["seed"] == 3
    assert about["versions"].keys() >= {"mujoco", "gymnasium-robotics"}
    line = capsys.readouterr().out.replace("\n", " ")
    assert f"5 episodes, {data.lengths.sum()} frames, expert success rate 1.000" in line


def test_the_folder_changes_with_every_setting() -> None:
    settings = [{}, {"episodes": 7}, {"noise": 0.1}, {"seed": 1}]
    names = {RecordingConfig("PointMaze", **change).folder_name for change in settings}
    names.add(RecordingConfig("FetchReach").folder_name)
    assert len(names) == 5


@pytest.mark.quick("2")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_recording_never_looks_complete_and_a_rerun_completes(
    tmp_path: Path, workers: int
) -> None:
    script = tmp_path / "slow.py"
    script.write_text(SLOWED_DOWN)
    root = tmp_path / "data"
    config = RecordingConfig("FetchReach", episodes=60)
    process = subprocess.Popen(
        [sys.executable, str(script), str(root), str(workers)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        partial = wait_for(lambda: list(root.glob(".*.partial-*/data/*/*.parquet")))
        children = children_of(process.pid)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert partial and not (root / config.folder_name).exists()
    with pytest.raises(FileNotFoundError):
        LeRobotDataset(root / config.folder_name)
    path = record(config, root, workers=1)
    assert len(LeRobotDataset(path).lengths) == 60
    assert not list(root.glob(".*.partial-*"))
    assert wait_for(lambda: not any(map(is_alive, children)))


def wait_for(condition: object, seconds: float = 30) -> object:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        result = condition()
        if result:
            return result
        time.sleep(0.02)
    return condition()


def children_of(pid: int) -> list[int]:
    """Child processes, where the system tells (Linux)."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in children.read_text().split()] if children.exists() else []


def is_alive(pid: int) -> bool:
    """Whether a process still runs; one that has ended and was not yet collected does not."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"simulation": "Cartpole"}, "unknown simulation"),
        ({"episodes": 0}, "record at least one"),
        ({"noise": -1.0}, "cannot be negative"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecordingConfig(**{"simulation": "FetchReach", **change})  # type: ignore[arg-type]


def test_a_script_without_main_guard_fails_and_says_why(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from datamodules.recording import RecordingConfig, record\n"
        "record(RecordingConfig('PointMaze', 2), 'data', workers=2)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "__main__" in done.stderr
    assert [path.name for path in (tmp_path / "data").iterdir() if path.is_dir()] == []
