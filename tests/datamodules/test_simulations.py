"""Simulated tasks: what a policy sees, success, the experts, errors without the simulator."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from datamodules import simulations
from datamodules.simulations import (
    SIMULATIONS,
    Simulation,
    SimulationUnavailableError,
    episode_seed,
    get_simulation,
)

NAMES = list(SIMULATIONS)


@pytest.fixture(params=NAMES)
def running(request: pytest.FixtureRequest) -> Iterator[tuple[Simulation, object]]:
    pytest.importorskip("gymnasium_robotics")
    simulation = get_simulation(request.param)
    env = simulation.make()
    yield simulation, env
    env.close()


def solve(simulation: Simulation, env: object, episode: int) -> int | None:
    """Control steps that the expert needs; None if it fails."""
    expert = simulation.expert(env)
    expert.reset()
    observation = simulation.reset(env, episode_seed("record", 0, episode))
    for step in range(simulation.max_steps):
        observation, success = simulation.step(env, expert.act(observation))
        if success:
            return step + 1
    return None


def test_state_and_actions_have_a_name_per_dimension(running: tuple[Simulation, object]) -> None:
    simulation, env = running
    observation = simulation.reset(env, 0)
    state = simulation.observe(observation)["observation.state"]
    assert state.shape == (len(simulation.state_names),) and state.dtype == np.float32
    assert env.action_space.shape == (len(simulation.action_names),)
    low, high = simulation.action_bounds
    np.testing.assert_array_equal(low, env.action_space.low)
    np.testing.assert_array_equal(high, env.action_space.high)


def test_hidden_goal_is_zero_and_nothing_else_changes(running: tuple[Simulation, object]) -> None:
    simulation, env = running
    observation = simulation.reset(env, 0)
    state = simulation.observe(observation)["observation.state"]
    goal = observation["desired_goal"].astype(np.float32)
    np.testing.assert_array_equal(state[simulation.goal_slice][: len(goal)], goal)
    hidden = simulation.hide_goal(np.stack([state, state]))
    assert (hidden[:, simulation.goal_slice] == 0).all()
    start = simulation.goal_slice.start
    np.testing.assert_array_equal(hidden[1, :start], state[:start])
    assert state[simulation.goal_slice].any()


def test_maze_state_tells_whether_the_goal_is_visible() -> None:
    pytest.importorskip("gymnasium_robotics")
    simulation = get_simulation("PointMaze")
    env = simulation.make()
    state = simulation.observe(simulation.reset(env, 1))["observation.state"]
    assert simulation.state_names[-1] == "goal_visible" and state[-1] == 1
    assert simulation.hide_goal(state)[-1] == 0
    assert np.linalg.norm(state[4:6] - state[:2]) >= simulation.min_goal_distance


def test_a_seed_starts_the_same_episode_whatever_ran_before(
    running: tuple[Simulation, object],
) -> None:
    simulation, env = running

    def trajectory(env: object) -> np.ndarray:
        expert = simulation.expert(env)
        observation = simulation.reset(env, 7)
        states = [simulation.observe(observation)["observation.state"]]
        for _ in range(8):
            observation, _ = simulation.step(env, expert.act(observation))
            states.append(simulation.observe(observation)["observation.state"])
        return np.stack(states)

    first = trajectory(env)
    solve(simulation, env, episode=3)
    np.testing.assert_array_equal(trajectory(env), first)
    other = simulation.make()
    np.testing.assert_array_equal(trajectory(other), first)
    other.close()


def test_experts_solve_the_first_episodes(running: tuple[Simulation, object]) -> None:
    simulation, env = running
    assert all(solve(simulation, env, episode) is not None for episode in range(4))


@pytest.mark.slow
def test_experts_solve_at_least_95_percent_of_60_episodes(
    running: tuple[Simulation, object],
) -> None:
    simulation, env = running
    solved = sum(solve(simulation, env, episode) is not None for episode in range(60))
    assert solved >= (57 if simulation.name == "FetchPush" else 60)


def test_seeds_of_recording_and_evaluation_differ() -> None:
    seeds = {
        episode_seed(purpose, seed, episode)
        for purpose in ("record", "evaluate")
        for seed in range(3)
        for episode in range(500)
    }
    assert len(seeds) == 2 * 3 * 500


def test_unknown_simulation_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="FetchReach, FetchPush, FetchPickAndPlace, PointMaze"):
        get_simulation("Cartpole")


@pytest.mark.parametrize("version", ["3.12.0", "3.13.1", "4.0.0"])
def test_a_mujoco_that_breaks_fetch_is_named_before_an_environment_is_made(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(simulations.metadata, "version", lambda package: version)
    with pytest.raises(SimulationUnavailableError, match=rf"mujoco {version}.*<3\.12"):
        get_simulation("FetchReach").make()


def test_without_mujoco_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise simulations.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(simulations.metadata, "version", missing)
    with pytest.raises(SimulationUnavailableError, match=r"pip install '\.\[sim\]'"):
        get_simulation("FetchReach").make()


def test_without_gymnasium_robotics_the_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(simulations.metadata, "version", lambda package: "3.8.1")
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    with pytest.raises(SimulationUnavailableError, match=r"gymnasium.*pip install '\.\[sim\]'"):
        get_simulation("FetchReach").make()


def test_a_maze_leaves_no_model_file_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gymnasium_robotics")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    env = get_simulation("PointMaze").make()
    env.reset(seed=0)
    env.close()
    assert list(tmp_path.iterdir()) == []
