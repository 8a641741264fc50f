"""Scripted experts: policies that solve the simulated tasks from the simulator's own observation.

All are (almost) functions of the current observation alone, so that what they do can be learned
from the recorded state; the maze expert also knows the map.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import gymnasium

Observation = Mapping[str, np.ndarray]


class Expert(Protocol):
    """A scripted policy for one environment."""

    def reset(self) -> None:
        """Begin a new episode."""

    def act(self, observation: Observation) -> np.ndarray:
        """Action `[D]` in [-1, 1] for the environment's raw observation."""


def _move(offset: np.ndarray, fingers: float, gain: float = 10.0) -> np.ndarray:
    """Fetch action that closes `offset [3]` (metres); full speed beyond 1 / gain metres."""
    return np.append(np.clip(gain * offset, -1.0, 1.0), fingers).astype(np.float32)


class ReachExpert:
    """Proportional controller from the gripper to the target."""

    def __init__(self, env: gymnasium.Env) -> None:
        del env

    def reset(self) -> None:
        """Nothing to forget."""

    def act(self, observation: Observation) -> np.ndarray:
        """Move straight to the target."""
        return _move(observation["desired_goal"] - observation["achieved_goal"], fingers=0.0)


class PickAndPlaceExpert:
    """Open above the block, descend around it, close, carry it to the target.

    Which of these comes next is read off the observation, so a disturbed grasp starts again.
    """

    HOVER = np.array([0.0, 0.0, 0.08])
    REACHED, ALIGNED, CLOSE = 0.02, 0.015, 0.03  # metres from gripper to block
    HELD = 0.025  # finger opening (m) with the 5 cm block between the fingers

    def __init__(self, env: gymnasium.Env) -> None:
        del env

    def reset(self) -> None:
        """Nothing to forget."""

    def act(self, observation: Observation) -> np.ndarray:
        """One of: go above the block, descend, close, carry."""
        state = observation["observation"]
        to_block, fingers = state[6:9], state[9:11].mean()
        aside = np.linalg.norm(to_block[:2])
        if np.linalg.norm(to_block) > self.REACHED:
            if aside > self.CLOSE:
                return _move(to_block + self.HOVER, fingers=1.0)
            if aside > self.ALIGNED:
                return _move(to_block * [1.0, 1.0, 0.0], fingers=1.0)
            return _move(to_block, fingers=1.0)
        if fingers > self.HELD:
            return _move(to_block, fingers=-1.0)
        return _move(observation["desired_goal"] - observation["achieved_goal"], fingers=-1.0)


class PushExpert:
    """Go behind the block as seen from the target, then push it along the line to the target."""

    BEHIND, ABOVE = 0.09, 0.1  # metres from the block's centre to where a push is prepared
    OFF_LINE = 0.02  # metres beside the line of the push that are still corrected while pushing
    ARRIVED = 0.02  # metres from block to target

    def __init__(self, env: gymnasium.Env) -> None:
        del env

    def reset(self) -> None:
        """Nothing to forget."""

    def act(self, observation: Observation) -> np.ndarray:
        """One of: rise and go behind the block, descend, push, stop."""
        gripper, block = observation["observation"][:3], observation["achieved_goal"]
        to_goal = (observation["desired_goal"] - block)[:2]
        distance = np.linalg.norm(to_goal)
        if distance < self.ARRIVED:
            return _move(np.zeros(3), fingers=0.0)
        direction = to_goal / distance
        to_gripper = gripper - block
        along = to_gripper[:2] @ direction
        aside = to_gripper[:2] - along * direction
        if along < -0.03 and np.linalg.norm(aside) < self.OFF_LINE and to_gripper[2] < 0.03:
            push = min(4.0 * distance, 0.08) * direction - aside
            return _move(np.append(push, -to_gripper[2]), fingers=0.0)
        to_start = -to_gripper[:2] - self.BEHIND * direction
        if np.linalg.norm(to_start) < 0.02:
            return _move(np.append(to_start, -to_gripper[2]), fingers=0.0)
        if to_gripper[2] < 0.06 and np.linalg.norm(to_gripper[:2]) < 0.12:
            to_start = np.zeros(2)  # rise first: at this height the way would sweep the block along
        return _move(np.append(to_start, self.ABOVE - to_gripper[2]), fingers=0.0)


class MazeExpert:
    """Shortest path over the map's cells (breadth-first search), driven by a PD controller."""

    def __init__(self, env: gymnasium.Env) -> None:
        self._maze: Any = env.get_wrapper_attr("maze")
        self._steps: dict[tuple[int, int], np.ndarray] = {}

    def reset(self) -> None:
        """Nothing to forget: distances are kept per goal cell."""

    def act(self, observation: Observation) -> np.ndarray:
        """Accelerate towards the next cell on the shortest path, or the goal in its cell."""
        position, velocity = observation["observation"][:2], observation["observation"][2:4]
        target = self._waypoint(position, observation["desired_goal"])
        force = 2.0 * (target - position) - 0.4 * velocity
        return np.clip(force, -1.0, 1.0).astype(np.float32)

    def _waypoint(self, position: np.ndarray, goal: np.ndarray) -> np.ndarray:
        here, there = self._cell(position), self._cell(goal)
        if here == there:
            return goal
        distances = self._distances(there)
        following = min(self._neighbours(here), key=lambda cell: distances[cell])
        return self._maze.cell_rowcol_to_xy(np.array(following))

    def _cell(self, position: np.ndarray) -> tuple[int, int]:
        row, column = self._maze.cell_xy_to_rowcol(position)
        return int(row), int(column)

    def _neighbours(self, cell: tuple[int, int]) -> list[tuple[int, int]]:
        row, column = cell
        cells = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
        return [c for c in cells if self._maze.maze_map[c[0]][c[1]] != 1]

    def _distances(self, goal: tuple[int, int]) -> np.ndarray:
        """Steps from every cell to `goal`, `[rows, columns]`; walls are infinitely far."""
        if goal not in self._steps:
            steps = np.full((self._maze.map_length, self._maze.map_width), np.inf)
            steps[goal] = 0.0
            queue = deque([goal])
            while queue:
                cell = queue.popleft()
                for neighbour in self._neighbours(cell):
                    if np.isinf(steps[neighbour]):
                        steps[neighbour] = steps[cell] + 1
                        queue.append(neighbour)
            self._steps[goal] = steps
        return self._steps[goal]


EXPERTS: dict[str, Callable[[gymnasium.Env], Expert]] = {
    "FetchReach": ReachExpert,
    "FetchPush": PushExpert,
    "FetchPickAndPlace": PickAndPlaceExpert,
    "PointMaze": MazeExpert,
}
