"""Environments that fit a policy, and what is said of those that do not."""

import numpy as np
import pytest
from expert_cases import ACTION, STATE, make_module

from lightning_modules.policy import ActionExpertPolicy

gymnasium = pytest.importorskip("gymnasium")


def box(low: float | list[float], high: float | list[float], size: int) -> gymnasium.spaces.Box:
    low, high = (np.broadcast_to(np.float32(values), (size,)) for values in (low, high))
    return gymnasium.spaces.Box(low, high, dtype=np.float32)


STATES = box(-np.inf, np.inf, STATE)
ACTIONS = box(-1, 1, ACTION)


class Env(gymnasium.Env):
    def __init__(self, observations: gymnasium.Space, actions: gymnasium.Space) -> None:
        self.observation_space = observations
        self.action_space = actions


def check(env, **features) -> None:
    ActionExpertPolicy(make_module(features=features)).check_environment(env)


@pytest.mark.parametrize(
    "observations",
    [
        STATES,
        gymnasium.spaces.Dict({"observation.state": STATES, "other": ACTIONS}),
        gymnasium.spaces.Dict({"observation": ACTIONS, "desired_goal": ACTIONS}),
    ],
)
def test_an_environment_that_fits_passes_vectorised_too(observations) -> None:
    def make() -> Env:
        return Env(observations, ACTIONS)

    check(make())
    check(make(), action_bounds=[[-1.0] * ACTION, [1.0] * ACTION])
    check(gymnasium.vector.SyncVectorEnv([make, make]))
    check(make(), action_range=[[-1 - 1e-7] * ACTION, [1 + 1e-7] * ACTION])  # float32 rounding


BOUNDS = [[-1.0] * ACTION, [1.0] * ACTION]


@pytest.mark.parametrize(
    ("observations", "actions", "features", "message"),
    [
        (box(-1, 1, STATE + 2), ACTIONS, {}, "has state_dim=7, the policy was trained with"),
        (
            gymnasium.spaces.Dict({"observation.state": box(-1, 1, 2)}),
            ACTIONS,
            {},
            "has state_dim=2, the policy was trained with state_dim=5: use the checkpoint",
        ),
        (STATES, box(-1, 1, 7), {}, "has action_dim=7, the policy was trained with action_dim=3"),
        (STATES, box([-1, -0.9, -1], 1, 3), {}, "from -0.9 to 1 in dimension 1, but the policy"),
        (STATES, box(-1, [0.4, 1, 1], 3), {}, "between -0.5 and 0.5: rescale the environment's"),
        (STATES, box(-2, 2, 3), {"action_bounds": BOUNDS}, "was trained for .*RescaleAction"),
        (STATES, gymnasium.spaces.Discrete(3), {}, "whose action_space is a gymnasium.spaces.Box"),
    ],
)
def test_an_environment_that_does_not_fit_is_named(observations, actions, features, message):
    with pytest.raises(ValueError, match=message):
        check(Env(observations, actions), **features)
