"""Closed loop: results do not depend on how many environments run side by side."""

from typing import Any

import numpy as np
import pytest

from datamodules.rollout import RolloutResult, rollout
from datamodules.simulations import Simulation, get_simulation

pytest.importorskip("gymnasium_robotics")


def reach(states: np.ndarray, new_episode: np.ndarray) -> np.ndarray:
    """FetchReach expert, from the policy's own view."""
    move = np.clip(10 * (states[:, -3:] - states[:, :3]), -1, 1)
    return np.concatenate([move, np.zeros((len(states), 1))], axis=1)


def run(name: str = "FetchReach", act: Any = reach, **options: Any) -> RolloutResult:
    return rollout(get_simulation(name), act, **{"episodes": 7, **options})


@pytest.mark.parametrize("num_envs", [2, 3, 7, 20])
def test_results_equal_those_of_one_environment(num_envs: int) -> None:
    expected, actual = run(num_envs=1), run(num_envs=num_envs)
    assert actual.successes.shape == (7,) and actual.successes.dtype == bool
    np.testing.assert_array_equal(actual.successes, expected.successes)
    np.testing.assert_array_equal(actual.lengths, expected.lengths)
    for name in ("positions", "goals", "actions"):
        for mine, other in zip(getattr(actual, name), getattr(expected, name), strict=True):
            np.testing.assert_array_equal(mine, other)


def test_an_episode_ends_at_its_first_success() -> None:
    result = run(num_envs=4)
    assert result.success_rate == 1.0
    for positions, goal, length in zip(result.positions, result.goals, result.lengths, strict=True):
        near = np.linalg.norm(positions - goal, axis=1) < 0.05
        assert len(positions) == length + 1
        assert near[-1] and not near[1:-1].any()


def test_an_episode_without_success_ends_at_the_step_limit() -> None:
    def stay(states: np.ndarray, new_episode: np.ndarray) -> np.ndarray:
        return np.zeros((len(states), 4))

    result = run(act=stay, episodes=3, seed=2)
    failed = result.lengths[~result.successes]
    assert failed.size and (failed == get_simulation("FetchReach").max_steps).all()


def test_seeds_start_other_episodes() -> None:
    first, second = run(seed=0), run(seed=1)
    assert not any(np.array_equal(a, b) for a, b in zip(first.goals, second.goals, strict=True))


class Recorder:
    """Stands still and remembers what it was shown."""

    def __init__(self, actions: int) -> None:
        self.states: list[np.ndarray] = []
        self.new: list[np.ndarray] = []
        self.actions = actions

    def __call__(self, states: np.ndarray, new_episode: np.ndarray) -> np.ndarray:
        self.states.append(states)
        self.new.append(new_episode)
        return np.zeros((len(states), self.actions))


def short(name: str, max_steps: int) -> Simulation:
    from dataclasses import replace

    return replace(get_simulation(name), max_steps=max_steps)


def test_new_episode_is_true_exactly_at_first_observations() -> None:
    recorder = Recorder(actions=2)
    rollout(short("PointMaze", 3), recorder, episodes=3, num_envs=2)
    # Row 0 runs episodes 0 and 2, row 1 episode 1 and then idles.
    assert np.stack(recorder.new).tolist() == [
        [True, True], [False, False], [False, False],
        [True, False], [False, False], [False, False],
    ]  # fmt: skip
    assert all(states.shape == (2, 7) and states.dtype == np.float32 for states in recorder.states)


@pytest.mark.parametrize("shown", [{0, 1}, {2}], ids=["early", "late"])
def test_goal_is_visible_in_the_given_steps_of_every_episode(shown: set[int]) -> None:
    recorder = Recorder(actions=2)
    rollout(short("PointMaze", 4), recorder, episodes=2, num_envs=1, goal_visible_steps=shown)
    visible = [states[0, -1] for states in recorder.states]
    assert visible == 2 * [int(step in shown) for step in range(4)]
    states = np.stack(recorder.states)[:, 0]
    hidden = states[[step not in shown for step in range(4)] * 2]
    assert (hidden[:, 4:] == 0).all() and hidden[:, :4].any()


def test_on_step_counts_finished_episodes() -> None:
    counts: list[int] = []
    run(num_envs=2, on_step=counts.append)
    assert counts == sorted(counts) and counts[-1] == 7


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.zeros((2, 3)), r"shape \(2, 3\), not \(2, 4\)"),
        (np.array([[0.0] * 4, [np.nan] * 4]), "row 1 is not finite"),
    ],
)
def test_bad_actions_are_named(actions: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(act=lambda states, new_episode: actions, num_envs=2)


def test_no_episodes_is_an_error() -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        run(episodes=0)
