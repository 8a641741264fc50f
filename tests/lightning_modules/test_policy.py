"""The policy against chunk-by-chunk sampling by hand, and rows against rows alone."""

import numpy as np
import pytest
import torch
from expert_cases import ACTION, STATE, STRIDE, make_module

from lightning_modules.policy import ActionExpertPolicy
from lightning_modules.streams import FastState

N = 3


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
    played = drive(ActionExpertPolicy(module, seed=4), states, first_only(len(states)))
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
    drive(ActionExpertPolicy(module), observations(len(new)), new)
    rows = [count for count, _ in seen]
    assert rows == [3, 1, 2, 1]  # all; row 1 anew; rows 0 and 2 on; row 1 on
    assert seen[1][1].tolist() == [0.0], "a new episode starts from the learned weights"
    assert (seen[2][1] > 0).all() and (seen[3][1] > 0).all()


def test_reset_equals_a_new_policy() -> None:
    module = make_module(ttt_state="carry_episode").eval()
    states, new = observations(6), first_only(6)
    policy = ActionExpertPolicy(module, seed=1)
    first = drive(policy, states, new)
    policy.reset()
    np.testing.assert_array_equal(first, drive(policy, states, new))


def test_acting_changes_neither_the_module_nor_its_streams_nor_global_randomness() -> None:
    module = make_module(ttt_state="carry_episode").eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random = torch.get_rng_state()
    drive(ActionExpertPolicy(module), observations(5), first_only(5))
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert module.streams.slots("train") == {}


@pytest.mark.parametrize("execute", [0, 7])
def test_an_impossible_number_of_executed_actions_is_an_error(execute: int) -> None:
    with pytest.raises(ValueError, match=f"execute={execute} must lie between 1 and the horizon"):
        ActionExpertPolicy(make_module(), execute=execute)
