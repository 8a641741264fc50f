"""A trained action expert as people drive robots with it: observation in, action out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_modules.models.backbone import STATE
from lightning_modules.models.checkpoint_file import read_checkpoint
from lightning_modules.models.exported_expert import ExportedExpert
from lightning_modules.streams import FastState, Slots, merge_rows, reset_rows, select_rows

if TYPE_CHECKING:
    from lightning_modules.action_expert import ActionExpertModule

ROUNDING = 1e-5
"""By how much recorded float32 actions may stand beyond the range that they were clipped to."""

Values = np.ndarray | Tensor | Sequence[Any]
Observation = Mapping[str, Values] | Values


class ActionExpertPolicy:
    """Receding-horizon control of one environment or of a batch of them.

    ```python
    policy = ActionExpertPolicy.from_checkpoint("runs/x/version_0/checkpoints/last.ckpt")
    policy.check_environment(env)
    policy.reset()
    action = policy.select_action(observation)
    ```

    Whenever a row's queue is empty (or its episode begins) a chunk of actions is sampled from the
    row's latest observation, and the first `execute` of them are played. With
    `ttt_state="carry_episode"` the row's fast state is carried from chunk to chunk and zeroed at
    the beginning of an episode. Nothing of the module's training state is read or changed.

    Args:
        module: the trained module; it is used without gradients.
        execute: actions played per sampled chunk; None takes the module's `execution_horizon`.
        seed: of the noise from which actions are sampled.

    Raises:
        ValueError: `execute` is not between 1 and the horizon.
    """

    def __init__(
        self,
        module: ActionExpertModule | ExportedExpert,
        *,
        execute: int | None = None,
        seed: int = 0,
    ) -> None:
        horizon = module.features["horizon"]
        self.execute = module.execution_horizon if execute is None else execute
        if not 1 <= self.execute <= horizon:
            raise ValueError(f"execute={self.execute} must lie between 1 and the horizon {horizon}")
        self.module = module
        self.seed = seed
        self._generator: torch.Generator | None = None
        """None until the first reset."""

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        execute: int | None = None,
        seed: int = 0,
        pretrained: str | None = None,
    ) -> ActionExpertPolicy:
        """The policy of a checkpoint that training wrote; nothing else is needed.

        Except that frozen weights of a pretrained model are loaded from where they came from.

        Where the EMA callback averaged the weights, the averages act, as they did in closed-loop
        evaluation.

        Args:
            path: e.g. `runs/quickstart/version_0/checkpoints/last.ckpt`.
            device: where the module runs.
            execute: actions played per sampled chunk; None takes the module's
                `execution_horizon`.
            seed: of the noise from which actions are sampled.
            pretrained: where the frozen weights of a pretrained model lie now (a hub id or a
                folder), if they have moved since training.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not the checkpoint of an action expert.
            KeyError: it lacks a statistic that normalisation needs.
        """
        from lightning_modules.action_expert import ActionExpertModule  # which imports this file

        module = ActionExpertModule.rebuild(read_checkpoint(path), pretrained)
        return cls(module.to(device), execute=execute, seed=seed)

    @classmethod
    def from_export(
        cls,
        folder: str | Path,
        *,
        device: torch.device | str = "cpu",
        execute: int | None = None,
        seed: int = 0,
        pretrained: str | None = None,
    ) -> ActionExpertPolicy:
        """The policy of a folder that `python -m lightning_modules.export` wrote.

        It acts as that of the checkpoint, bit for bit, and lightning is not loaded.

        Args:
            folder: of the export; the other arguments are those of `from_checkpoint`.

        Raises:
            FileNotFoundError: there is no export.
            ValueError: it is no policy, or belongs to other pretrained weights.
        """
        expert = ExportedExpert.load(folder, pretrained)
        return cls(expert.to(device), execute=execute, seed=seed)

    def reset(self, rows: Values | None = None) -> None:
        """Begin episodes: forget queued actions and fast state.

        Args:
            rows: environments whose next observation begins an episode, `[N]` bool: of vectorised
                environments, `terminated | truncated`. None begins everything anew, also the
                noise, and the number of environments may change.

        Raises:
            RuntimeError: `rows` before the first `reset()`.
            ValueError: `rows` is not one bool per environment.
        """
        if rows is None:
            self._generator = torch.Generator(self.module.device).manual_seed(self.seed)
            self._slots: Slots = {}
            self._queue: Tensor | None = None
            self._played: Tensor | None = None
            return
        self._check_reset()
        if self._played is None:
            return  # no row has begun yet
        fresh = torch.as_tensor(rows).cpu()
        if fresh.dtype != torch.bool or fresh.shape != self._played.shape:
            raise ValueError(
                f"reset got {fresh.dtype} of shape {tuple(fresh.shape)} for {len(self._played)} "
                "environments: give one bool per environment, or nothing to restart all of them"
            )
        self._slots = reset_rows(self._slots, fresh)
        self._played[fresh] = self.execute

    def select_action(self, observation: Observation) -> np.ndarray | Tensor:
        """The next action of one environment, or of each environment of a batch.

        Args:
            observation: `[S]` or `[N, S]` in the units of the training data, an array or a
                tensor; or a mapping with that under "observation.state". Several `state_keys` of
                the training data are concatenated in their order. A policy with cameras also
                takes their pictures by name, `[3, H, W]` or `[H, W, 3]` (`[N, ...]` in a batch),
                uint8 or floating in [0, 1] (a camera that is absent is not seen), and under
                "task" the instruction, or one for each environment; without it, the only one
                that it was trained on.

        Returns:
            Actions `[D]` or `[N, D]` in the units of the training data, float32; a tensor (on
            the same device) for a tensor, an array otherwise.

        Raises:
            RuntimeError: `reset` was never called.
            ValueError: the observation has another size, the number of rows has changed, or there
                is no picture or no instruction where the policy needs one.
            KeyError: the mapping has no "observation.state".
        """
        values = _state_of(observation)
        states = torch.as_tensor(values, dtype=torch.float32)
        alone = states.dim() == 1
        rows = states[None] if alone else states
        actions = self._act(rows, self._senses(observation, rows, alone))
        actions = actions[0] if states.dim() == 1 else actions
        return actions.to(values.device) if isinstance(values, Tensor) else actions.numpy()

    def select_actions(self, states: np.ndarray, new_episode: np.ndarray) -> np.ndarray:
        """`reset(new_episode)`, then one action per row: what `datamodules.rollout` calls.

        Args:
            states: observation of every row, `[N, S]`, in the units of the training data.
            new_episode: rows whose episode begins with this observation, `[N]` bool.

        Returns:
            Actions `[N, D]` in the units of the training data.
        """
        self.reset(new_episode)
        return self._act(torch.as_tensor(states, dtype=torch.float32)).numpy()

    def check_environment(self, env: Any) -> None:
        """Compare an environment's spaces with what the policy was trained on.

        Args:
            env: a gymnasium environment, vectorised or not. A dict of observations without
                "observation.state" is not looked at: the caller makes the state of it, and
                `select_action` checks that.

        Raises:
            ValueError: actions or observations have another size, or actions another range.
        """
        actions = getattr(env, "single_action_space", env.action_space)
        if not (hasattr(actions, "low") and hasattr(actions, "high")):
            raise ValueError(
                f"the environment takes {actions}, but the policy's actions are real numbers: "
                "use an environment whose action_space is a gymnasium.spaces.Box"
            )
        observations = getattr(env, "single_observation_space", env.observation_space)
        self.check(_state_size(observations), actions.low, actions.high)

    def check(self, state_dim: int | None, action_low: np.ndarray, action_high: np.ndarray) -> None:
        """As `check_environment`, for a place that is described by numbers.

        Args:
            state_dim: size of its observation; None leaves that unchecked.
            action_low: lowest action, `[D]`.
            action_high: highest action, `[D]`.
        """
        features = self.module.features
        expected = {"state_dim": features["state_dim"], "action_dim": features["action_dim"]}
        found = {"state_dim": state_dim, "action_dim": int(np.size(action_low))}
        for name, size in found.items():
            if size is not None and size != expected[name]:
                raise ValueError(
                    f"the environment has {name}={size}, the policy was trained with "
                    f"{name}={expected[name]}: use the checkpoint of a policy for this "
                    "environment, or the environment of this policy"
                )
        _check_range(features, np.ravel(action_low), np.ravel(action_high))

    def _senses(self, observation: Observation, states: Tensor, alone: bool) -> dict[str, Any]:
        """What is seen beside the state: pictures `[N, 3, H, W]` by camera, instructions [N]."""
        cameras = self.module.features["image_keys"]
        if not cameras or not isinstance(observation, Mapping):
            return {}
        self._check_reset()
        self._check_states(states)
        rows = len(states)
        pictures = {key: observation[key] for key in cameras if key in observation}
        senses: dict[str, Any] = {key: _picture(key, p, alone) for key, p in pictures.items()}
        if "task" in observation:
            task = observation["task"]
            senses["task"] = [task] * rows if isinstance(task, str) else list(task)
        for name, values in senses.items():
            if len(values) != rows:
                raise ValueError(f"{name} has {len(values)} rows, observation.state has {rows}")
        return senses

    def _act(self, states: Tensor, senses: Mapping[str, Any] | None = None) -> Tensor:
        """One action `[N, D]` (on the CPU) for every row of states `[N, S]`."""
        self._check_reset()
        self._check_states(states)
        if self._played is None:
            self._played = torch.full((len(states),), self.execute)
        rows = torch.nonzero(self._played >= self.execute).flatten()
        if len(rows):
            self._plan(states.to(self.module.device), rows, senses or {})
        assert self._queue is not None
        actions = self._queue[torch.arange(len(self._played)), self._played]
        self._played = self._played + 1
        return actions

    def _plan(self, states: Tensor, rows: Tensor, senses: Mapping[str, Any]) -> None:
        """Sample chunks for some rows, fill their queues and carry their fast state on."""
        assert self._played is not None
        fast_state = FastState(select_rows(self._slots, rows))
        observation: Any = states[rows.to(states.device)]
        if senses:
            seen = {name: _select(values, rows) for name, values in senses.items()}
            observation = {STATE: observation, **seen}
        chunk = self.module.sample_actions(observation, fast_state, self._generator).cpu()
        if self.module.carries_episode:
            self._slots = merge_rows(self._slots, rows, fast_state.outgoing, len(self._played))
        if self._queue is None:
            self._queue = torch.zeros(len(self._played), *chunk.shape[1:])
        self._queue[rows] = chunk
        self._played[rows] = 0

    def _check_reset(self) -> None:
        if self._generator is None:
            raise RuntimeError(
                "the policy has not begun an episode: call policy.reset() before the first "
                "observation, and again (or reset(rows)) whenever an episode begins"
            )

    def _check_states(self, states: Tensor) -> None:
        size = self.module.features["state_dim"]
        if states.dim() != 2 or states.shape[1] != size:
            raise ValueError(
                f"the observation has shape {tuple(states.shape)}, the policy was trained with "
                f"state_dim={size}: give [{size}] for one environment or [N, {size}] for N"
            )
        if self._played is not None and len(states) != len(self._played):
            raise ValueError(
                f"the policy drives {len(self._played)} environments and got observations of "
                f"{len(states)}: call reset() when their number changes"
            )


def _state_of(observation: Observation) -> Values:
    if not isinstance(observation, Mapping):
        return observation
    if STATE not in observation:
        raise KeyError(
            f"the observation has no {STATE!r} (only {', '.join(map(repr, observation))}): put "
            "what the policy was trained on under that key, or give the bare array"
        )
    return observation[STATE]


def _picture(key: str, values: Values, alone: bool) -> Tensor:
    """Pictures of one camera as `[N, 3, H, W]`."""
    pictures = torch.as_tensor(values)
    pictures = pictures[None] if alone else pictures
    if pictures.dim() == 4 and pictures.shape[1] != 3 and pictures.shape[3] == 3:
        pictures = pictures.permute(0, 3, 1, 2)
    if pictures.dim() != 4 or pictures.shape[1] != 3:
        shape = "[3, H, W]" if alone else "[N, 3, H, W]"
        raise ValueError(f"{key} has shape {tuple(np.shape(values))}: give {shape} pictures")
    return pictures


def _select(values: Tensor | list[str], rows: Tensor) -> Tensor | list[str]:
    """The given rows (`[n]` int64, on the CPU) of pictures or instructions."""
    if isinstance(values, Tensor):
        return values[rows.to(values.device)]
    return [values[row] for row in rows.tolist()]


def _state_size(space: Any) -> int | None:
    """Size of the state in an observation space; None if the space does not name it."""
    members = getattr(space, "spaces", None)
    if isinstance(members, Mapping):
        space = members.get(STATE)
    return None if space is None else int(np.prod(space.shape))


def _check_range(features: Mapping[str, Any], low: np.ndarray, high: np.ndarray) -> None:
    bounds = features["action_bounds"]
    if bounds is not None and not np.allclose([low, high], bounds, atol=ROUNDING):
        raise ValueError(
            f"the environment takes actions from {low.tolist()} to {high.tolist()}, the policy was "
            f"trained for {bounds[0]} to {bounds[1]}: rescale the environment's actions "
            "(gymnasium.wrappers.RescaleAction), or train on recordings of this environment"
        )
    first, last = (np.asarray(values) for values in features["action_range"])
    wrong = np.flatnonzero((first < low - ROUNDING) | (last > high + ROUNDING))
    if len(wrong):
        dim = int(wrong[0])
        raise ValueError(
            f"the environment takes actions from {low[dim]:g} to {high[dim]:g} in dimension {dim}, "
            f"but the policy learned from actions between {first[dim]:g} and {last[dim]:g}: "
            "rescale the environment's actions (gymnasium.wrappers.RescaleAction), or train on "
            "recordings of this environment"
        )
