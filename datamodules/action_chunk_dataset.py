"""Chunks of recorded episodes: the state at a moment and the actions that followed it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from datamodules.cameras import Camera
from datamodules.lerobot import LeRobotDataset
from datamodules.sampler import ChunkRequest
from datamodules.splits import split_by_hash, unit_hash
from datamodules.statistics import Statistics, feature_statistics

ArrayT = TypeVar("ArrayT", np.ndarray, Tensor)

STATE, ACTION = "observation.state", "action"


@dataclass(frozen=True)
class ActionChunkConfig:
    """How episodes are cut.

    Args:
        horizon: actions per chunk (A).
        stride: frames from one chunk of a stream to the next: as many actions as the policy
            executes before it is asked again.
        mode: `stream` makes every episode a file whose chunk c starts at frame c * stride;
            `shuffled` makes every frame the start of a file of its own with one chunk, which is
            ordinary behaviour cloning.
        state_keys: features that are concatenated to `observation.state`.
        image_keys: cameras to load, `[3, height, width]` uint8 each.
        delta_actions: action dimensions that are given relative to the same dimension of the
            state at the start of the chunk.
        goal_visible_chunks: in `stream` mode, the chunks of an episode in which the goal (the
            dimensions of the state named "goal_...") is visible; in the others it is zero. None
            shows it always.
    """

    horizon: int = 16
    stride: int = 8
    mode: Literal["stream", "shuffled"] = "stream"
    state_keys: tuple[str, ...] = (STATE,)
    image_keys: tuple[str, ...] = ()
    delta_actions: tuple[int, ...] = ()
    goal_visible_chunks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("stream", "shuffled"):
            raise ValueError(f"unknown mode {self.mode!r}; choose stream or shuffled")
        if not 1 <= self.stride <= self.horizon:
            raise ValueError(
                f"stride={self.stride} must be between 1 and horizon={self.horizon}: with a "
                "larger one, some actions would stand in no chunk"
            )
        if self.goal_visible_chunks is not None and self.mode != "stream":
            raise ValueError(
                "goal_visible_chunks counts the chunks of an episode, so it needs mode: stream"
            )
        if not self.state_keys:
            raise ValueError("state_keys is empty; name at least one numeric feature")
        if ACTION in self.state_keys:
            raise ValueError(
                f"state_keys={list(self.state_keys)} has {ACTION!r}, which is what is predicted: "
                "take it out"
            )
        if len(set(self.state_keys)) < len(self.state_keys):
            raise ValueError(f"state_keys={list(self.state_keys)} names a feature twice")


def to_delta(actions: ArrayT, state: ArrayT, dims: Sequence[int]) -> ArrayT:
    """`actions[..., d] - state[..., d]` for the given dimensions; the others stay.

    Args:
        actions: `[..., A, D]`.
        state: `[..., S]`, at the start of the chunk.
        dims: dimensions, the same in actions and state.
    """
    return _shift(actions, state, dims, -1)


def from_delta(actions: ArrayT, state: ArrayT, dims: Sequence[int]) -> ArrayT:
    """Inverse of `to_delta`: `actions[..., d] + state[..., d]`."""
    return _shift(actions, state, dims, +1)


def _shift(actions: ArrayT, state: ArrayT, dims: Sequence[int], sign: int) -> ArrayT:
    dims = list(dims)
    shifted = actions.clone() if isinstance(actions, Tensor) else actions.copy()
    shifted[..., dims] += sign * state[..., None, :][..., dims]
    return shifted


def split_episodes(
    episode_index: Sequence[int], val_fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Positions of the training and of the validation episodes.

    A hash of the seed and an episode's number decides (see `split_by_hash`), so episodes that are
    added later move no other one.

    Raises:
        ValueError: the fraction is not in [0, 1), or no training episode is left.
    """
    hashes = [unit_hash(f"{seed}:{int(episode)}") for episode in episode_index]
    training, validation = split_by_hash(hashes, val_fraction, "episodes")
    return training.tolist(), validation.tolist()


class ActionChunkDataset:
    """Chunks of the given episodes, on request of the stream sampler.

    A sample has `observation.state [S]`, the chosen cameras, `action [A, D]` (what follows the
    end of the episode repeats its last action), `action_is_pad [A]` (true there, and everywhere
    in idle rows), `episode_index`, `frame_index` (where the chunk starts) and `task` (all scalar
    int64).

    Args:
        data: the folder, with `state_keys` and the action loaded.
        episodes: positions of the episodes to use.
        config: how they are cut.

    Raises:
        ValueError: the horizon is longer than every episode, no episode was given, or a
            dimension or goal that the settings name does not exist.
    """

    def __init__(
        self, data: LeRobotDataset, episodes: Sequence[int], config: ActionChunkConfig
    ) -> None:
        self.data = data
        self.config = config
        self.episodes = np.asarray(episodes, dtype=np.int64)
        self.goal_dims = _goal_dims(data, config)
        self._cameras = {key: Camera(data, key) for key in config.image_keys}
        self._check()
        frames = data.lengths[self.episodes]
        if config.mode == "stream":
            self.lengths: Sequence[int] = (-(-frames // config.stride)).tolist()
        else:
            self.lengths = [1] * int(frames.sum())
            self._ends = np.cumsum(frames)

    def _check(self) -> None:
        if len(self.episodes) == 0:
            raise ValueError(f"no episode of {self.data.root} was chosen")
        longest = int(self.data.lengths.max())
        if self.config.horizon > longest:
            raise ValueError(
                f"horizon={self.config.horizon} is longer than every episode of {self.data.root} "
                f"(the longest has {longest} frames); choose a horizon of at most {longest}"
            )
        width = min(state_width(self.data, self.config), self.data.width(ACTION))
        wrong = [d for d in self.config.delta_actions if not 0 <= d < width]
        if wrong:
            raise ValueError(
                f"delta_actions {wrong} are not dimensions of both state and action (0 to "
                f"{width - 1})"
            )

    def __getitem__(self, request: ChunkRequest) -> dict[str, Tensor]:
        """The chunk that the sampler asks for; an idle row gets one that is all padding."""
        episode, frame = (int(self.episodes[0]), 0) if request.idle else self._place(request)
        state = self.state(episode, frame)
        action, is_pad = self.actions(episode, frame)
        if request.idle:
            is_pad[:] = True
        action = to_delta(action, state, self.config.delta_actions)
        visible = self.config.goal_visible_chunks
        if visible is not None and request.index not in visible:
            state[self.goal_dims] = 0.0
        row = int(self.data.starts[episode]) + frame
        return {
            STATE: torch.from_numpy(state),
            **{k: torch.from_numpy(c.read(episode, frame)) for k, c in self._cameras.items()},
            ACTION: torch.from_numpy(action),
            "action_is_pad": torch.from_numpy(is_pad),
            "episode_index": torch.tensor(int(self.data.episode_index[episode])),
            "frame_index": torch.tensor(frame),
            "task": torch.tensor(int(self.data.task_index[row])),
        }

    def _place(self, request: ChunkRequest) -> tuple[int, int]:
        """Episode and frame at which a chunk starts."""
        if self.config.mode == "stream":
            return int(self.episodes[request.file]), request.index * self.config.stride
        position = int(np.searchsorted(self._ends, request.file, side="right"))
        start = int(self._ends[position - 1]) if position else 0
        return int(self.episodes[position]), request.file - start

    def state(self, episode: int, frame: int) -> np.ndarray:
        """A copy of the state `[S]` at a frame."""
        row = int(self.data.starts[episode]) + frame
        return np.concatenate([self.data.columns[key][row] for key in self.config.state_keys])

    def actions(self, episode: int, frame: int) -> tuple[np.ndarray, np.ndarray]:
        """Copies of the actions `[A, D]` from a frame on, and where they are padding `[A]`."""
        recorded = self.data.episode(episode, ACTION)
        wanted = np.arange(frame, frame + self.config.horizon)
        return recorded[np.minimum(wanted, len(recorded) - 1)], wanted >= len(recorded)

    def statistics(self) -> dict[str, Statistics]:
        """Statistics of states and actions over these episodes, after the delta transform.

        Without delta actions every frame counts once; with them every action of every chunk that
        could start somewhere (padding excluded), because its value depends on where that is.
        """
        return {
            STATE: feature_statistics(self._states(e) for e in self.episodes.tolist()),
            ACTION: feature_statistics(self._action_blocks()),
        }

    def _action_blocks(self) -> Iterator[np.ndarray]:
        for episode in self.episodes.tolist():
            recorded = self.data.episode(episode, ACTION)
            if not self.config.delta_actions:
                yield recorded
                continue
            wanted = np.arange(len(recorded))[:, None] + np.arange(self.config.horizon)
            chunks = recorded[np.minimum(wanted, len(recorded) - 1)]
            deltas = to_delta(chunks, self._states(episode), self.config.delta_actions)
            yield deltas[wanted < len(recorded)]

    def _states(self, episode: int) -> np.ndarray:
        """All states `[L, S]` of an episode."""
        parts = [self.data.episode(episode, key) for key in self.config.state_keys]
        return np.concatenate(parts, axis=1)


def state_width(data: LeRobotDataset, config: ActionChunkConfig) -> int:
    """Dimensions of the concatenated state."""
    return sum(data.width(key) for key in config.state_keys)


def _goal_dims(data: LeRobotDataset, config: ActionChunkConfig) -> list[int]:
    if config.goal_visible_chunks is None:
        return []
    names: list[Any] = []
    for key in config.state_keys:
        names += data.names(key) or [""] * data.width(key)
    dims = [i for i, name in enumerate(names) if name.startswith("goal_")]
    if not dims:
        raise ValueError(
            f"goal_visible_chunks needs to know where the goal stands, but no dimension of "
            f"{', '.join(config.state_keys)} in {data.root} has a name that begins with 'goal_'"
        )
    return dims
