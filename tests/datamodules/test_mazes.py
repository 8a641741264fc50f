"""Walls in pictures are where the simulator's are."""

import numpy as np
import pytest

from datamodules.mazes import walls_of
from datamodules.simulations import episode_seed, get_simulation

pytest.importorskip("gymnasium_robotics")


def test_walls_equal_the_boxes_of_the_physics_model() -> None:
    env = get_simulation("PointMaze").make()
    model = env.unwrapped.point_env.unwrapped.model
    boxes = [model.geom(n) for n in range(model.ngeom) if "block" in model.geom(n).name]
    expected = [(*(box.pos[:2] - box.size[:2]), *(2 * box.size[:2])) for box in boxes]
    assert len(expected) > 30  # the border of 8 x 8 cells has 28, the others stand inside
    np.testing.assert_allclose(sorted(walls_of(env)), sorted(expected), atol=1e-6)
    env.close()


def test_the_expert_never_enters_a_wall() -> None:
    simulation = get_simulation("PointMaze")
    env = simulation.make()
    walls, expert = np.array(walls_of(env)), simulation.expert(env)
    low, high = walls[:, :2], walls[:, :2] + walls[:, 2:]
    for episode in range(5):
        observation = simulation.reset(env, episode_seed("record", 0, episode))
        success = False
        for _ in range(simulation.max_steps):
            position = observation["achieved_goal"]
            assert not ((low < position) & (position < high)).all(axis=1).any()
            if success:
                break
            observation, success = simulation.step(env, expert.act(observation))
        assert success
    env.close()


def test_a_simulation_without_a_maze_has_no_walls() -> None:
    env = get_simulation("FetchReach").make()
    assert walls_of(env) == ()
    env.close()
