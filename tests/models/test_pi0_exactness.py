"""The pi0 backbone against transformers' own model, bit for bit, and what the mistakes change."""

from pathlib import Path

import pytest
import torch
from pi0_cases import (
    STRIDE,
    TASKS,
    make_chunk,
    make_pi0,
    noise_and_time,
    official_inputs,
    sample,
    save_official,
    written,
)
from torch import Tensor
from transformers import PI0ForConditionalGeneration

from lightning_modules.action_expert import ActionExpertModule
from lightning_modules.streams import FastState, Slots

CLOSED = {"alpha_init": 0.0}


@pytest.fixture
def official(tmp_path: Path) -> tuple[Path, PI0ForConditionalGeneration]:
    return tmp_path, save_official(tmp_path)


def equal(a: Slots, b: Slots) -> bool:
    return all(torch.equal(a[slot][name], b[slot][name]) for slot in a for name in a[slot])


@pytest.mark.quick("expert-False-False", "lora-True-True")
@pytest.mark.parametrize("adarms", [False, True])
@pytest.mark.parametrize("with_ttt", [False, True])
@pytest.mark.parametrize("train", ["expert", "lora"])
def test_closed_gates_sample_what_the_official_model_samples_bit_for_bit(
    official, train: str, with_ttt: bool, adarms: bool
) -> None:
    folder, reference = official
    module = make_pi0(
        pretrained=str(folder), ttt=CLOSED, with_ttt=with_ttt, shake=False, adarms=adarms,
        train=train,
    ).eval()  # fmt: skip
    chunk, (noise, _) = make_chunk(), noise_and_time(1)
    expected = reference.sample_actions(**official_inputs(module, chunk), noise=noise, num_steps=3)
    assert torch.equal(sample(module, chunk, noise, 3), expected)
    generator = torch.Generator().manual_seed(1)  # draws the same noise first
    assert torch.equal(module.sample_actions(chunk, None, generator), expected[..., :3])


@pytest.mark.quick("True")
@pytest.mark.parametrize("adarms", [False, True])
def test_open_gates_and_another_layer_sample_something_else(official, adarms: bool) -> None:
    folder, reference = official
    options = {"pretrained": str(folder), "shake": False, "adarms": adarms}
    chunk, (noise, _) = make_chunk(), noise_and_time(1)
    inputs = official_inputs(make_pi0(**options), chunk)
    expected = reference.sample_actions(**inputs, noise=noise, num_steps=3)
    module = make_pi0(**options, ttt={"alpha_init": 0.5}).eval()
    assert not torch.allclose(sample(module, chunk, noise, 3), expected)
    module = make_pi0(**options, ttt=CLOSED).eval()
    with torch.no_grad():
        module.model.decoder.layers[0].mlp.down_proj.weight.add_(0.1)
    assert not torch.allclose(sample(module, chunk, noise, 3), expected)


def test_one_joint_training_forward_equals_the_official_one_and_the_cached_one(official) -> None:
    folder, reference = official
    module = make_pi0(pretrained=str(folder), ttt=CLOSED, shake=False, train="all")
    chunk, (noise, time) = make_chunk(), noise_and_time(2)
    reference.train(), module.train()
    joint = reference(**official_inputs(module, chunk), noise=noise, timestep=time).logits
    ours = module.model(module.model.observe(chunk), noise, time)
    assert torch.equal(ours, joint)
    module.eval()
    with torch.no_grad():
        prefix = module.model.observe(chunk)
        first = module.model(prefix, noise, time)
        again = module.model(prefix, noise, time)  # reading the prefix did not change it
    assert torch.equal(first, joint) and torch.equal(again, joint)


@pytest.mark.parametrize("adarms", [False, True])
def test_with_open_gates_training_and_sampling_compute_the_same_velocity(adarms: bool) -> None:
    module = make_pi0(adarms=adarms, train="all").train()
    chunk, (noise, _) = make_chunk(), noise_and_time(2)
    time = torch.full((3,), 1.0)
    trained = module.model(module.model.observe(chunk), noise, time)
    module.eval()
    one_step = sample(module, chunk, noise, 1)
    assert torch.equal(one_step, noise - trained)


def test_the_condition_of_each_euler_step_is_its_own() -> None:
    module = make_pi0(adarms=True).eval()
    chunk, (noise, _) = make_chunk(), noise_and_time(3)
    right = sample(module, chunk, noise, 4)
    with torch.no_grad():
        stale = module.model.time_mlp(torch.ones(3))
    module.model.time_mlp.forward = lambda time: stale  # the mistake: computed once for all steps
    assert not torch.allclose(sample(module, chunk, noise, 4), right)


@pytest.mark.quick(
    "after_attn-none", "after_residual-tanh", "parallel_attn-adarms", "replace_attn-adarms_tanh"
)
@pytest.mark.parametrize("gate", ["none", "tanh", "adarms", "adarms_tanh"])
@pytest.mark.parametrize("mode", ["after_attn", "after_residual", "parallel_attn", "replace_attn"])
def test_what_the_state_token_writes_depends_on_neither_noise_nor_time(
    mode: str, gate: str
) -> None:
    module = make_pi0(adarms=True, ttt={"ttt_mode": mode, "ttt_gate": gate})
    first = written(module, 1, "observation")
    assert len(first) == 2 and all(fields["dw"].abs().sum() > 0 for fields in first.values())
    assert equal(first, written(module, 2, "observation"))
    for other in ("all", "action"):
        assert not equal(written(module, 1, other), written(module, 2, other)), "power"


def test_without_adarms_the_state_token_writes_the_same_and_attention_has_no_gate() -> None:
    module = make_pi0(adarms=False, ttt={"ttt_mode": "after_residual"})
    assert equal(written(module, 1, "observation"), written(module, 2, "observation"))
    fast_state = FastState.transient({"gate"})
    noise, time = noise_and_time(1)
    module.model(module.model.observe(make_chunk()), noise, time, fast_state=fast_state)
    published = fast_state.published["gate"]["layers.0.self_attn"]
    assert "gate_attn" not in published and "gate_ttt" in published


def test_a_condition_that_reaches_the_state_token_would_be_seen() -> None:
    module = make_pi0(adarms=True)
    first = written(module, 1, "observation")
    import lightning_modules.models.pi0 as pi0

    right = pi0.with_unseen_observation
    try:
        pi0.with_unseen_observation = lambda cond: torch.stack([cond, cond], dim=1)
        assert not equal(first, written(module, 1, "observation"))
        assert not equal(written(module, 1, "observation"), written(module, 2, "observation"))
    finally:
        pi0.with_unseen_observation = right


def test_every_euler_step_commits_what_training_commits() -> None:
    module = make_pi0(adarms=True, module={"ttt_state": "carry_episode"})
    chunk, fast_state = make_chunk(), FastState.transient()
    module.sample_actions(chunk, fast_state, torch.Generator().manual_seed(3))
    module.streams.begin_step("train")
    module.chunk_loss(chunk, module.streams.begin(chunk), None)
    module.streams.commit()
    assert equal(fast_state.outgoing, module.streams.slots("train"))


def test_the_carried_state_changes_what_is_sampled_and_a_reset_forgets_it() -> None:
    module = make_pi0(adarms=True, module={"ttt_state": "carry_episode"}).eval()
    fast_state = FastState.transient()
    module.sample_actions(make_chunk(), fast_state, torch.Generator().manual_seed(3))

    def later(handle: FastState) -> Tensor:
        return module.sample_actions(make_chunk(1), handle, torch.Generator().manual_seed(4))

    fresh = later(FastState.transient())
    assert not torch.allclose(later(fast_state.advance()), fresh)
    assert torch.equal(later(FastState.transient()), fresh)


def test_a_row_alone_equals_the_row_in_a_batch() -> None:
    module = make_pi0(adarms=True).double()
    chunk, (noise, time) = make_chunk(), noise_and_time(1)
    chunk["observation.state"] = chunk["observation.state"].double()
    row = {key: chunk[key][1:2] for key in chunk if isinstance(chunk[key], Tensor)}
    together = module.model(module.model.observe(chunk), noise.double(), time.double())
    alone = module.model(module.model.observe(row), noise[1:2].double(), time[1:2].double())
    # Pixels stay float32 until the vision tower; everything behind is float64.
    torch.testing.assert_close(alone[0], together[1], rtol=1e-10, atol=1e-10)


def test_what_follows_the_instruction_as_padding_has_no_influence() -> None:
    module = make_pi0()
    chunk, (noise, time) = make_chunk(), noise_and_time(1)
    first = module.model(module.model.observe(chunk), noise, time)
    other = {**chunk, "task": 1 - chunk["task"]}
    assert len(TASKS) == 2 and STRIDE > 1
    assert not torch.allclose(module.model(module.model.observe(other), noise, time), first)
    with torch.no_grad():  # the embedding of padding
        module.model.pi0.model.vlm.get_input_embeddings().weight[0] += 100.0
    torch.testing.assert_close(module.model(module.model.observe(chunk), noise, time), first)


def test_carry_denoise_carries_across_euler_steps_over_one_prefix() -> None:
    reset, carried = (
        make_pi0(module={"ttt_state": state}).eval() for state in ("reset", "carry_denoise")
    )

    def sampled(module: ActionExpertModule) -> Tensor:
        return module.sample_actions(make_chunk(), None, torch.Generator().manual_seed(5))

    assert not torch.allclose(sampled(reset), sampled(carried))
    for module in (reset, carried):
        module.denoise_steps = 1
    assert torch.equal(sampled(reset), sampled(carried))
