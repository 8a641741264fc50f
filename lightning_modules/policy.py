"""A trained action expert as people drive robots with it: observation in, action out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lightning_modules.streams import FastState, Slots, merge_rows, reset_rows, select_rows

if TYPE_CHECKING:
    from lightning_modules.action_expert import ActionExpertModule


class ActionExpertPolicy:
    """Receding-horizon control of a batch of environments, with action queue and fast state.

    Whenever a row's queue is empty (or its episode begins) a chunk of actions is sampled from the
    row's latest observation, and the first `execute` of them are played. With
    `ttt_state="carry_episode"` the row's fast state is carried from chunk to chunk and zeroed at
    the beginning of an episode. Nothing of the module's training state is read or changed.

    Args:
        module: the trained module; used in eval mode without gradients.
        execute: actions played per sampled chunk; None takes the module's `execution_horizon`.
        seed: of the noise from which actions are sampled.
    """

    def __init__(
        self, module: ActionExpertModule, *, execute: int | None = None, seed: int = 0
    ) -> None:
        horizon = module.features["horizon"]
        self.execute = module.execution_horizon if execute is None else execute
        if not 1 <= self.execute <= horizon:
            raise ValueError(f"execute={self.execute} must lie between 1 and the horizon {horizon}")
        self.module = module
        self.seed = seed
        self.reset()

    def reset(self) -> None:
        """Forget every episode: queues, fast state, and the noise generator's position."""
        self._slots: Slots = {}
        self._queue: Tensor | None = None
        self._played: Tensor | None = None
        self._generator = torch.Generator(self.module.device).manual_seed(self.seed)

    def select_actions(self, states: np.ndarray, new_episode: np.ndarray) -> np.ndarray:
        """One action per row.

        Args:
            states: observation of every row, `[N, S]`, in the units of the training data.
            new_episode: rows whose episode begins with this observation, `[N]` bool.

        Returns:
            Actions `[N, D]` in the units of the training data.
        """
        observation = torch.as_tensor(states, dtype=torch.float32, device=self.module.device)
        fresh = torch.as_tensor(new_episode, dtype=torch.bool)
        if self._played is None:
            fresh = torch.ones_like(fresh)
            self._played = torch.zeros(len(fresh), dtype=torch.long)
        if self._slots:
            self._slots = reset_rows(self._slots, fresh)
        rows = torch.nonzero(fresh | (self._played >= self.execute)).flatten()
        if len(rows):
            self._plan(observation, rows)
        assert self._queue is not None
        actions = self._queue[torch.arange(len(self._played)), self._played]
        self._played = self._played + 1
        return actions.numpy()

    def _plan(self, observation: Tensor, rows: Tensor) -> None:
        """Sample chunks for some rows, fill their queues and carry their fast state on."""
        assert self._played is not None
        fast_state = FastState(select_rows(self._slots, rows))
        chunk = self.module.sample_actions(
            observation[rows.to(observation.device)], fast_state, self._generator
        ).cpu()
        if self.module.streams.persistent:
            self._slots = merge_rows(self._slots, rows, fast_state.outgoing)
        if self._queue is None:
            self._queue = torch.zeros(len(self._played), *chunk.shape[1:])
        self._queue[rows] = chunk
        self._played[rows] = 0
