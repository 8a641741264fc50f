"""Record scripted experts into LeRobot folders: once, atomically, on all cores."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import track

from datamodules.lerobot_writer import LeRobotWriter
from datamodules.simulations import (
    Simulation,
    episode_seed,
    get_simulation,
    simulator_versions,
)

FRAMES_AFTER_SUCCESS = 12
"""Frames kept behind the first success, so that holding still is part of what is learned."""

EPISODES_PER_WORKER = 25
"""Below this many episodes another process takes longer to start than it saves."""


@dataclass(frozen=True)
class RecordingConfig:
    """What a recording is made of; the same settings give the same frames on the same versions.

    Args:
        simulation: name of the task.
        episodes: number of episodes.
        noise: standard deviation of the Gaussian noise on half of the executed actions (actions
            are in [-1, 1]); the action that is stored is always the expert's own.
        seed: fixes start positions, targets and noise.
    """

    simulation: str
    episodes: int = 1000
    noise: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        get_simulation(self.simulation)
        if self.episodes < 1:
            raise ValueError(f"episodes={self.episodes}: record at least one")
        if self.noise < 0:
            raise ValueError(f"noise={self.noise} is a standard deviation, it cannot be negative")

    @property
    def folder_name(self) -> str:
        """Readable name that differs whenever a setting or the task's definition does."""
        task = asdict(get_simulation(self.simulation))
        text = json.dumps([asdict(self), task, FRAMES_AFTER_SUCCESS], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return f"{self.simulation.lower()}-{self.episodes}-{digest}"


class Episode(NamedTuple):
    """One recorded episode."""

    states: np.ndarray
    actions: np.ndarray
    success: bool


def record(config: RecordingConfig, root: str | Path, workers: int | None = None) -> Path:
    """Record `config` into a folder below `root`, unless it is there already.

    Args:
        config: what to record.
        root: folder of recordings.
        workers: processes; None takes the available cores. Does not change what is recorded.

    Returns:
        The LeRobot folder.

    Raises:
        RuntimeError: the calling script has no `if __name__ == "__main__":` around the call.
    """
    path = Path(root) / config.folder_name
    if path.exists():
        return path
    _refuse_while_importing_main()
    simulation = get_simulation(config.simulation)
    try:
        writer = LeRobotWriter(
            path, simulation.fps, _features(simulation), robot_type=simulation.environment
        )
    except FileExistsError:  # another process recorded it while we waited for its lock
        return path
    started, successes, frames = time.perf_counter(), 0, 0
    with writer:
        for episode in track(
            _episodes(config, workers or _default_workers(config.episodes)),
            description=f"recording {simulation.name}",
            total=config.episodes,
        ):
            writer.add_episode(
                {"observation.state": episode.states, "action": episode.actions},
                task=simulation.task,
            )
            successes, frames = successes + episode.success, frames + len(episode.states)
        writer.add_metadata("recording.json", _description(config, successes))
    print(
        f"recorded {config.episodes} episodes, {frames} frames, expert success rate "
        f"{successes / config.episodes:.3f}, in {time.perf_counter() - started:.1f} s: {path}"
    )
    return path


def record_episode(
    config: RecordingConfig, simulation: Simulation, env: Any, episode: int
) -> Episode:
    """Run the expert once; the result depends on the settings and the episode's number alone."""
    rng = np.random.default_rng([config.seed, episode])
    expert = simulation.expert(env)
    observation = simulation.reset(env, episode_seed("record", config.seed, episode))
    states: list[np.ndarray] = []
    actions: list[np.ndarray] = []
    last, first_success = simulation.max_steps, None
    while len(states) < last:
        action = expert.act(observation)
        states.append(simulation.observe(observation)["observation.state"])
        actions.append(action)
        disturbance = rng.normal(0.0, config.noise, action.shape)
        executed = action + disturbance if rng.random() < 0.5 else action
        observation, success = simulation.step(env, executed)
        if success and first_success is None:
            first_success = len(states)
            last = min(last, first_success + FRAMES_AFTER_SUCCESS)
    return Episode(np.stack(states), np.stack(actions), first_success is not None)


def _episodes(config: RecordingConfig, workers: int) -> Iterator[Episode]:
    """All episodes in order."""
    if workers == 1:
        simulation = get_simulation(config.simulation)
        env = simulation.make()
        for number in range(config.episodes):
            yield record_episode(config, simulation, env, number)
        env.close()
        return
    # Spawned, not forked: a forked worker would inherit the writer's lock and keep it if this
    # process is killed.
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(config,),
    )
    with pool:
        try:
            yield from pool.map(_work, range(config.episodes), chunksize=4)
        finally:
            pool.shutdown(cancel_futures=True)


_worker: dict[str, Any] = {}
"""A worker process' settings and environment, made once by its initializer."""


def _start_worker(config: RecordingConfig) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    simulation = get_simulation(config.simulation)
    _worker.update(config=config, simulation=simulation, env=simulation.make())


def _work(number: int) -> Episode:
    return record_episode(_worker["config"], _worker["simulation"], _worker["env"], number)


def _refuse_while_importing_main() -> None:
    """A spawned worker imports the main script again; it would wait for its parent's lock."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            "recording starts processes, which import your script once more: put what it runs "
            'under `if __name__ == "__main__":`'
        )


def _end_with_parent() -> None:
    """Workers of a killed process would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _default_workers(episodes: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, episodes // EPISODES_PER_WORKER))


def _features(simulation: Simulation) -> dict[str, dict[str, Any]]:
    return {
        name: {"dtype": "float32", "shape": [len(names)], "names": list(names)}
        for name, names in (
            ("observation.state", simulation.state_names),
            ("action", simulation.action_names),
        )
    }


def _description(config: RecordingConfig, successes: int) -> dict[str, Any]:
    return {
        "about": (
            "Scripted expert in a simulator. On half of the executed actions there is Gaussian "
            "noise; the stored actions are the expert's own. Frames end "
            f"{FRAMES_AFTER_SUCCESS} after the first success."
        ),
        "settings": asdict(config),
        "environment": get_simulation(config.simulation).environment,
        "expert_success_rate": successes / config.episodes,
        "versions": simulator_versions(),
    }
