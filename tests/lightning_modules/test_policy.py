"""The policy against chunk-by-chunk sampling by hand; episodes that begin in some rows only."""

import numpy as np
import pytest
import torch
from expert_cases import ACTION, STATE, STRIDE, make_module

from lightning_modules.action_expert import ActionExpertModule
from lightning_modules.policy import ActionExpertPolicy
from lightning_modules.streams import FastState

N = 3


def begun(module: ActionExpertModule, **options) -> ActionExpertPolicy:
    """A policy that was reset."""
    policy = ActionExpertPolicy(module, **options)
    policy.reset()
    return policy


def observations(steps: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(steps, N, STATE)).astype(np.float32)


def drive(policy: ActionExpertPolicy, states: np.ndarray, new: np.ndarray) -> np.ndarray:
    return np.stack([policy.select_actions(s, n) for s, n in zip(states, new, strict=True)])


def first_only(steps: int) -> np.ndarray:
    new = np.zeros((steps, N), dtype=bool)
    new[0] = True
    return new


@pytest.mark.parametrize("state", ["reset", "carry_denoise", "carry_episode"])
def test_queue_and_fast_state_equal_sampling_chunk_by_chunk_by_hand(state: str) -> None:
    module = make_module(ttt_state=state).eval()
    states = observations(3 * STRIDE)
    played = drive(begun(module, seed=4), states, first_only(len(states)))
    assert played.shape == (3 * STRIDE, N, ACTION)
    generator, handle = torch.Generator().manual_seed(4), FastState.transient()
    for start in range(0, len(states), STRIDE):
        chunk = module.sample_actions(torch.from_numpy(states[start]), handle, generator)
        expected = chunk[:, :STRIDE].transpose(0, 1).numpy()
        np.testing.assert_array_equal(played[start : start + STRIDE], expected)
        handle = handle.advance() if state == "carry_episode" else FastState.transient()


def test_a_row_whose_episode_begins_forgets_and_the_others_go_on(monkeypatch) -> None:
    module = make_module(ttt_state="carry_episode").eval()
    seen: list[tuple[int, float]] = []
    original = module.sample_actions

    def spy(state, fast_state, generator):
        carried = fast_state.outgoing
        size = carried["layers.0.self_attn"]["dw"].abs().flatten(1).sum(1) if carried else None
        seen.append((len(state), size))
        return original(state, fast_state, generator)

    monkeypatch.setattr(module, "sample_actions", spy)
    new = first_only(STRIDE + 3)
    new[2, 1] = True  # row 1 begins an episode in the middle of its queue
    drive(begun(module), observations(len(new)), new)
    rows = [count for count, _ in seen]
    assert rows == [3, 1, 2, 1]  # all; row 1 anew; rows 0 and 2 on; row 1 on
    assert seen[1][1].tolist() == [0.0], "a new episode starts from the learned weights"
    assert (seen[2][1] > 0).all() and (seen[3][1] > 0).all()


def test_reset_equals_a_new_policy() -> None:
    module = make_module(ttt_state="carry_episode").eval()
    states, new = observations(6), first_only(6)
    policy = begun(module, seed=1)
    first = drive(policy, states, new)
    policy.reset()
    np.testing.assert_array_equal(first, drive(policy, states, new))


def test_acting_changes_neither_the_module_nor_its_streams_nor_global_randomness() -> None:
    module = make_module(ttt_state="carry_episode").eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random = torch.get_rng_state()
    drive(begun(module), observations(5), first_only(5))
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert module.streams.slots("train") == {}


@pytest.mark.parametrize("execute", [0, 7])
def test_an_impossible_number_of_executed_actions_is_an_error(execute: int) -> None:
    with pytest.raises(ValueError, match=f"execute={execute} must lie between 1 and the horizon"):
        ActionExpertPolicy(make_module(), execute=execute)


def test_select_action_and_reset_of_rows_equal_select_actions() -> None:
    module = make_module(ttt_state="carry_episode").eval()
    states, new = observations(2 * STRIDE + 1), first_only(2 * STRIDE + 1)
    new[2, 1] = new[5, 0] = new[STRIDE, 2] = True
    expected = drive(begun(module), states, new)
    policy, played = begun(module), []
    for state, ended in zip(states, new, strict=True):
        policy.reset(ended)
        played.append(policy.select_action({"observation.state": state, "task": "reach"}))
    np.testing.assert_array_equal(np.stack(played), expected)
    policy, played = begun(module), []
    for state in states:  # power: nobody tells the policy that episodes begin
        played.append(policy.select_action(state))
    assert not np.allclose(np.stack(played), expected)


def test_one_environment_equals_a_batch_of_one() -> None:
    module = make_module(ttt_state="carry_episode").eval()
    states = observations(2 * STRIDE)[:, 0]
    alone, batch = begun(module), begun(module)
    for state in states:
        action = alone.select_action(state)
        assert isinstance(action, np.ndarray) and action.shape == (ACTION,)
        assert action.dtype == np.float32
        np.testing.assert_array_equal(action, batch.select_action(state[None])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_is_answered_by_a_tensor_and_a_list_by_an_array(dtype: torch.dtype) -> None:
    module, state = make_module().eval(), observations(1)[0]
    expected = begun(module).select_action(state)
    tensor = begun(module).select_action({"observation.state": torch.from_numpy(state).to(dtype)})
    assert isinstance(tensor, torch.Tensor)
    np.testing.assert_array_equal(tensor.numpy(), expected)
    np.testing.assert_array_equal(begun(module).select_action(state.tolist()), expected)


def test_reset_begins_with_another_number_of_environments() -> None:
    policy, states = begun(make_module().eval()), observations(1)[0]
    policy.select_action(states)
    with pytest.raises(ValueError, match="drives 3 environments and got observations of 1: call"):
        policy.select_action(states[0])
    policy.reset()
    assert policy.select_action(states[0]).shape == (ACTION,)


def test_execute_replaces_the_execution_horizon(monkeypatch) -> None:
    module, calls = make_module().eval(), []
    original = module.sample_actions
    monkeypatch.setattr(module, "sample_actions", lambda *a: calls.append(1) or original(*a))
    policy = begun(module, execute=2)
    for state in observations(5):
        policy.select_action(state)
    assert len(calls) == 3


def test_select_action_before_reset_is_an_error() -> None:
    policy = ActionExpertPolicy(make_module())
    state, new = observations(1)[0], np.ones(N, dtype=bool)
    for call in (
        lambda: policy.select_action(state),
        lambda: policy.select_actions(state, new),
        lambda: policy.reset(new),
    ):
        with pytest.raises(RuntimeError, match="call policy.reset\\(\\) before the first"):
            call()


@pytest.mark.parametrize(
    "rows", [np.ones(2, dtype=bool), np.array([0, 1, 1]), [1], np.ones((3, 1), dtype=bool)]
)
def test_reset_of_rows_takes_one_bool_per_environment(rows) -> None:
    policy = begun(make_module())
    policy.reset([True] * N)  # before the first observation every row is new anyway
    policy.select_action(observations(1)[0])
    with pytest.raises(ValueError, match="for 3 environments: give one bool per environment"):
        policy.reset(rows)


@pytest.mark.parametrize("shape", [(STATE + 1,), (2, STATE - 1), (1, 2, STATE), ()])
def test_an_observation_of_another_size_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"trained with state_dim={STATE}: give \\[{STATE}\\]"):
        begun(make_module()).select_action(np.zeros(shape))


def test_an_observation_without_the_state_is_an_error() -> None:
    with pytest.raises(KeyError, match="no 'observation.state' \\(only 'agent_pos'\\)"):
        begun(make_module()).select_action({"agent_pos": np.zeros(STATE)})
