"""DataModules for robot policies: any LeRobot folder, or a simulation that is recorded first."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from datamodules.action_chunk_dataset import (
    ACTION,
    STATE,
    ActionChunkConfig,
    ActionChunkDataset,
    split_episodes,
    state_width,
)
from datamodules.base import Stage, StreamDataModule
from datamodules.lerobot import LeRobotDataset
from datamodules.loader import StreamLoader
from datamodules.recording import RecordingConfig, record
from datamodules.simulations import Simulation, SimulationName, get_simulation
from datamodules.statistics import Statistics

__all__ = ["ActionChunkDataModule", "ActionChunkDataset", "RecordedSimulation"]


class ActionChunkDataModule(StreamDataModule):
    """Chunks of robot episodes from a folder in the LeRobot v3.0 format.

    Args:
        root: the folder that contains `meta/` and `data/`.
        horizon: actions per chunk.
        stride: frames from one chunk of an episode to the next; let the policy execute as many
            actions before it is asked again.
        mode: `stream` reads episodes chunk after chunk, so that a policy can learn to remember;
            `shuffled` makes every frame a file of one chunk (ordinary behaviour cloning).
        state_keys: numeric features that are concatenated to `observation.state`.
        image_keys: cameras to load, `[3, height, width]` uint8.
        delta_actions: action dimensions to be given relative to the state at the chunk's start.
        goal_visible_chunks: chunks of an episode in which the policy sees the goal, e.g. [0] for
            the first one; in the others the state's dimensions named "goal_..." are zero. None
            shows it always.
        val_fraction: share of the episodes used for validation, chosen by a hash of their number.
        streams: options of every DataModule: batch_size, tbptt, num_workers, seed.
    """

    simulation: Simulation | None = None
    """Where a policy trained on this data can be tried, if there is such a place."""

    def __init__(
        self,
        root: str,
        *,
        horizon: int = 16,
        stride: int = 8,
        mode: Literal["stream", "shuffled"] = "stream",
        state_keys: tuple[str, ...] = (STATE,),
        image_keys: tuple[str, ...] = (),
        delta_actions: tuple[int, ...] = (),
        goal_visible_chunks: tuple[int, ...] | None = None,
        val_fraction: float = 0.1,
        **streams: Any,
    ) -> None:
        super().__init__(**streams)
        self.root = Path(root)
        self.chunks = ActionChunkConfig(
            horizon=horizon,
            stride=stride,
            mode=mode,
            state_keys=tuple(state_keys),
            image_keys=tuple(image_keys),
            delta_actions=tuple(delta_actions),
            goal_visible_chunks=None if goal_visible_chunks is None else tuple(goal_visible_chunks),
        )
        self.val_fraction = val_fraction
        if mode == "shuffled" and self.tbptt != 1:
            raise ValueError(
                f"tbptt={self.tbptt} needs files of several chunks; use mode: stream, or tbptt: 1"
            )

    @cached_property
    def dataset(self) -> LeRobotDataset:
        """The folder; read on first use.

        Raises:
            FileNotFoundError: it does not exist.
            LeRobotFormatError: it cannot be used.
        """
        return LeRobotDataset(self.root, columns=(*self.chunks.state_keys, ACTION))

    @cached_property
    def _split(self) -> tuple[list[int], list[int]]:
        return split_episodes(self.dataset.episode_index.tolist(), self.val_fraction, self.seed)

    @cached_property
    def features(self) -> dict[str, Any]:
        """What a policy must know of the data: plain values, stored in its checkpoints.

        `state_dim`, `action_dim`, `horizon`, `stride` (None in `shuffled` mode), `image_keys`,
        `tasks` (task index -> instruction), `delta_actions`, `action_range` (lowest and highest
        recorded action, `[2][D]`) and `action_bounds` (those of the simulation that was recorded;
        None where it is not known).
        """
        bounds = None if self.simulation is None else self.simulation.action_bounds
        return {
            "state_dim": state_width(self.dataset, self.chunks),
            "action_dim": self.dataset.width(ACTION),
            "horizon": self.chunks.horizon,
            "stride": self.chunks.stride if self.chunks.mode == "stream" else None,
            "image_keys": list(self.chunks.image_keys),
            "tasks": self.dataset.tasks,
            "delta_actions": list(self.chunks.delta_actions),
            "action_range": self._action_range(),
            "action_bounds": bounds and [bound.tolist() for bound in bounds],
        }

    def _action_range(self) -> list[list[float]]:
        """Over the training episodes, as recorded: the delta transform does not count."""
        actions = np.concatenate([self.dataset.episode(e, ACTION) for e in self._split[0]])
        return [actions.min(axis=0).tolist(), actions.max(axis=0).tolist()]

    @property
    def goal_visible_steps(self) -> frozenset[int] | None:
        """Control steps in which a policy that is tried sees the goal; None: in all of them."""
        chunks, stride = self.chunks.goal_visible_chunks, self.chunks.stride
        if chunks is None:
            return None
        return frozenset(chunk * stride + step for chunk in chunks for step in range(stride))

    @cached_property
    def statistics(self) -> dict[str, Statistics]:
        """Statistics of `observation.state` and `action` over the training episodes."""
        return self.build_dataset("train").statistics()

    def setup(self, stage: str) -> None:
        """Read the folder, so that what is wrong with it shows before the first step."""
        self.build_dataset("train")

    def build_dataset(self, stage: Stage) -> ActionChunkDataset:
        """Training episodes for `train`, validation episodes for every other stage."""
        training, validation = self._split
        episodes = training if stage == "train" else validation
        return ActionChunkDataset(self.dataset, episodes, self.chunks)

    def val_dataloader(self) -> StreamLoader | list[Any]:  # type: ignore[override]
        """Validation episodes in order; an empty list (nothing to do) with `val_fraction: 0`."""
        return super().val_dataloader() if self.val_fraction > 0 else []


class RecordedSimulation(ActionChunkDataModule):
    """Episodes of a scripted expert in a simulator, recorded on first use.

    The recording is a LeRobot folder below `root`; its name changes with its settings, and it is
    reused as long as it is there. Needs the extra `sim`.

    Args:
        simulation: the task.
        episodes: episodes to record.
        noise: standard deviation of the noise on half of the executed actions (the stored ones
            are clean), which shows the policy how to recover from its own mistakes.
        root: folder of recordings, relative to the working directory.
        chunks: options of `ActionChunkDataModule`.
    """

    def __init__(
        self,
        simulation: SimulationName,
        *,
        episodes: int = 1000,
        noise: float = 0.3,
        root: str = "data",
        **chunks: Any,
    ) -> None:
        # Not the DataModule's seed, which is the training's: another one must not record again.
        self.recording = RecordingConfig(simulation, episodes, noise)
        self.recordings = Path(root)
        super().__init__(root=str(self.recordings / self.recording.folder_name), **chunks)
        self.simulation = get_simulation(simulation)

    def prepare_data(self) -> None:
        """Record the episodes unless they are there; other processes wait."""
        record(self.recording, self.recordings)
