"""The action expert against its base model, its own unrolled window, and its sampler."""

from typing import Any

import pytest
import torch
from expert_cases import ACTION, HORIZON, STATE, make_chunk, make_module
from torch import Tensor

from lightning_modules.action_expert import ActionExpertModule
from lightning_modules.streams import FastState, Slots

MODES = ("after_attn", "after_residual", "parallel_attn", "replace_attn")
GATES = ("none", "tanh", "adarms", "adarms_tanh")


def velocity(module: ActionExpertModule, chunk: dict, seed: int, **options) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = len(chunk["stream_id"])
    noisy = torch.randn(rows, HORIZON, ACTION, generator=generator)
    time = torch.rand(rows, generator=generator)
    return module.model(chunk["observation.state"], noisy, time, **options)


def written(module: ActionExpertModule, seed: int, write: str) -> Slots:
    """State after one forward call with noise and times drawn from `seed`."""
    fast_state = FastState.transient()
    velocity(module, make_chunk(), seed, fast_state=fast_state, write=write)
    return fast_state.outgoing


def equal(a: Slots, b: Slots) -> bool:
    return all(torch.equal(a[slot][name], b[slot][name]) for slot in a for name in a[slot])


@pytest.mark.parametrize("adarms", [True, False])
@pytest.mark.parametrize("mode", MODES[:3])
def test_a_zero_gate_equals_the_base_model_bit_for_bit(mode: str, adarms: bool) -> None:
    module = make_module(expert={"adarms": adarms}, ttt={"ttt_mode": mode, "alpha_init": 0.0})
    base = make_module(expert={"adarms": adarms}, with_ttt=False)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("ttt_gate.alpha"):
                parameter.zero_()
    plain = {
        name.replace("base_attention.", ""): value
        for name, value in module.model.state_dict().items()
        if ".ttt" not in name
    }
    base.model.load_state_dict(plain)
    for train in (True, False):
        module.train(train), base.train(train)
        assert torch.equal(velocity(module, make_chunk(), 0), velocity(base, make_chunk(), 0))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("mode", MODES)
def test_what_observations_write_depends_on_neither_noise_nor_time(mode: str, gate: str) -> None:
    module = make_module(
        expert={"observation_tokens": 2},
        ttt={"ttt_mode": mode, "ttt_gate": gate, "ttt_input_norm": "adarms"},
    )
    first = written(module, 1, "observation")
    assert len(first) == 2 and all(fields["dw"].abs().sum() > 0 for fields in first.values())
    assert equal(first, written(module, 2, "observation"))
    for other in ("all", "action"):
        assert not equal(written(module, 1, other), written(module, 2, other)), "power"


def test_every_euler_step_commits_what_training_commits() -> None:
    module = make_module(ttt_state="carry_episode")
    chunk, fast_state = make_chunk(), FastState.transient()
    module.sample_actions(chunk["observation.state"], fast_state, torch.Generator().manual_seed(3))
    module.streams.begin_step("train")
    module.chunk_loss(chunk, module.streams.begin(chunk), None)
    module.streams.commit()
    assert equal(fast_state.outgoing, module.streams.slots("train"))


def test_the_carried_state_changes_what_is_sampled() -> None:
    module = make_module(ttt_state="carry_episode")
    fast_state = FastState.transient()
    state = make_chunk()["observation.state"]
    module.sample_actions(state, fast_state, torch.Generator().manual_seed(3))

    def sample(handle: FastState) -> Tensor:
        later = make_chunk(1)["observation.state"]
        return module.sample_actions(later, handle, torch.Generator().manual_seed(4))

    assert not torch.allclose(sample(fast_state.advance()), sample(FastState.transient()))


def test_carry_denoise_carries_across_euler_steps_and_not_across_chunks() -> None:
    reset, carried = make_module(ttt_state="reset"), make_module(ttt_state="carry_denoise")
    state = make_chunk()["observation.state"]

    def sample(module: ActionExpertModule) -> Tensor:
        return module.sample_actions(state, None, torch.Generator().manual_seed(5))

    assert not torch.allclose(sample(reset), sample(carried))
    assert torch.equal(sample(carried), sample(carried))
    for module in (reset, carried):
        module.denoise_steps = 1
    assert torch.equal(sample(reset), sample(carried))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_gradients_over_three_chunks_with_and_without_checkpointing(kind: str) -> None:
    results = []
    for recompute in (False, True):
        module = make_module(
            expert={"gradient_checkpointing": recompute},
            layer={"kind": kind},
            ttt_state="carry_episode",
        )
        module.streams.begin_step("train")
        torch.manual_seed(7)
        chunks = [make_chunk(index) for index in range(3)]
        losses = [module.chunk_loss(c, module.streams.begin(c), None) for c in chunks]
        torch.stack(losses).sum().backward()
        results.append({name: p.grad for name, p in module.named_parameters()})
    for name, gradient in results[0].items():
        assert gradient is not None and gradient.abs().sum() > 0, f"{name} does not learn"
        assert torch.equal(gradient, results[1][name]), name


def test_a_row_alone_equals_the_row_in_a_batch() -> None:
    module = make_module().double()
    chunk = make_chunk()
    state = chunk["observation.state"].double()
    noisy, time = torch.randn(3, HORIZON, ACTION).double(), torch.rand(3).double()
    together = module.model(state, noisy, time)
    alone = module.model(state[1:2], noisy[1:2], time[1:2])
    torch.testing.assert_close(alone[0], together[1], rtol=1e-12, atol=1e-12)


def test_training_and_eval_mode_agree_and_forward_changes_no_parameter() -> None:
    module = make_module()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.train()
    trained = velocity(module, make_chunk(), 0)
    module.eval()
    assert torch.equal(trained, velocity(module, make_chunk(), 0))
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_padded_actions_do_not_count_in_the_loss() -> None:
    module, chunk = make_module(), make_chunk()
    chunk["action_is_pad"][:, 3:] = True

    def loss() -> Tensor:
        return module.chunk_loss(chunk, FastState.transient(), torch.Generator().manual_seed(0))

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, HORIZON, ACTION, generator=generator)
    time = 0.001 + 0.999 * torch.rand(3, generator=generator) ** (2 / 3)
    noisy = time[:, None, None] * noise + (1 - time[:, None, None]) * chunk["action"]
    out = module.model(chunk["observation.state"], noisy, time)
    expected = (out - (noise - chunk["action"]))[:, :3].square().mean()
    torch.testing.assert_close(loss(), expected)


def test_delta_actions_are_added_to_the_state_that_they_start_from() -> None:
    plain, delta = make_module(), make_module(features={"delta_actions": (1,)})
    state = make_chunk()["observation.state"]
    a, b = (m.sample_actions(state, None, torch.Generator().manual_seed(2)) for m in (plain, delta))
    a[..., 1] += state[:, None, 1]
    torch.testing.assert_close(a, b)


def test_parameter_groups_cover_gate_fast_adapter_and_base() -> None:
    module = make_module(ttt={"ttt_gate": "adarms_tanh"})
    groups = {name: module.parameter_group(name) for name, _ in module.named_parameters()}
    prefix = "model.layers.0.self_attn."
    assert groups[prefix + "ttt.W1"] == groups[prefix + "ttt.learnable_ttt_lr_bias"] == "fast"
    assert groups[prefix + "ttt.k_proj.weight"] == "adapter"
    assert groups[prefix + "ttt_gate.alpha"] == groups[prefix + "ttt_gate.dense.weight"] == "gate"
    assert groups[prefix + "base_attention.q_proj.weight"] == "base"
    assert groups["model.state_proj.weight"] == "base"


def test_new_parameters_can_train_faster_and_vectors_do_not_decay() -> None:
    from lightning_modules.base import ParameterGroup

    module = make_module(
        groups={"adapter": ParameterGroup(lr_scale=10.0), "base": ParameterGroup(frozen=True)}
    )
    module._trainer = type("Trainer", (), {"estimated_stepping_batches": 10})()
    optimizer = module.configure_optimizers()["optimizer"]
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert set(groups) == {"adapter", "adapter/no_decay", "fast", "fast/no_decay", "gate/no_decay"}
    assert groups["adapter"]["initial_lr"] == pytest.approx(1e-2)
    assert groups["fast"]["initial_lr"] == pytest.approx(1e-3)
    assert groups["adapter"]["weight_decay"] > 0 == groups["fast/no_decay"]["weight_decay"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ttt_layer_positions": [0, 2]}, "has 2, but the expert's 2 layers are 0 to 1"),
        ({"layer": {}, "expert": {"hidden_size": 17}}, "not divisible by num_heads=2"),
        ({"features": {"horizon": 3}}, "execution_horizon=4 exceeds the data's horizon 3"),
        (
            {"ttt_state": "carry_episode", "features": {"stride": 2}},
            "data's stride is 2: set the DataModule's mode to stream and its stride to 4",
        ),
        ({"expert": {"adarms": False, "observation_tokens": 2}}, "exactly one state token"),
        ({"expert": {"num_heads": 3, "num_kv_heads": 2}}, "multiple of num_kv_heads=2"),
        ({"features": {"image_keys": ["observation.images.top"]}}, "remove image_keys"),
        ({"groups": {"gates": None}}, "unknown parameter group 'gates'"),
    ],
)
def test_bad_input_names_cause_and_fix(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_module(**options)


def test_a_checkpoint_rebuilds_the_model_and_refuses_other_sizes() -> None:
    module = make_module()
    checkpoint: dict = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    fresh = make_module()
    fresh.model = None
    fresh.on_load_checkpoint(checkpoint)
    fresh.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(velocity(module, make_chunk(), 0), velocity(fresh, make_chunk(), 0))
    other = make_module(features={"state_dim": STATE + 1})
    with pytest.raises(ValueError, match=f"state_dim={STATE}, the data has {STATE + 1}"):
        other.on_load_checkpoint(checkpoint)


def test_a_checkpoint_refuses_data_with_other_delta_actions() -> None:
    checkpoint: dict = {}
    make_module(features={"delta_actions": (1,)}).on_save_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=r"delta_actions=\(1,\), the data has \(\)"):
        make_module().on_load_checkpoint(checkpoint)


def test_predictions_stand_beside_the_recorded_actions_both_absolute() -> None:
    module = make_module(features={"delta_actions": (1,)}, ttt_state="carry_episode")
    chunk, fast_state = make_chunk(), FastState.transient()
    prediction = module.predict_chunk(chunk, fast_state, torch.Generator().manual_seed(0))
    state, recorded = chunk["observation.state"], chunk["action"].clone()
    recorded[..., 1] += state[:, None, 1]
    assert torch.equal(prediction["recorded_action"], recorded)
    alone = FastState.transient()
    sampled = module.sample_actions(state, alone, torch.Generator().manual_seed(0))
    assert torch.equal(prediction["action"], sampled)
    assert equal(fast_state.outgoing, alone.outgoing) and fast_state.outgoing
    for name in ("episode_index", "frame_index", "action_is_pad"):
        assert torch.equal(prediction[name], chunk[name])


def test_without_ttt_layers_the_control_has_none() -> None:
    module = make_module(ttt_layer_positions=None)
    assert not [name for name, _ in module.named_parameters() if ".ttt" in name]
    only = make_module(ttt_layer_positions=[1])
    layers = {name.split(".")[2] for name, _ in only.named_parameters() if ".ttt" in name}
    assert layers == {"1"}


@pytest.mark.slow
@pytest.mark.parametrize("topics", [set(), {"gate", "fast_weight"}], ids=["alone", "monitored"])
def test_compiled_training_equals_eager_with_carried_state(topics: set[str]) -> None:
    def losses_and_gradients(compiled: bool) -> tuple[Tensor, dict[str, Tensor], Any]:
        module = make_module(ttt_state="carry_episode", compile_model=compiled)
        module.streams.listening = topics
        module.streams.begin_step("train")
        torch.manual_seed(3)
        chunks = [make_chunk(index) for index in range(3)]
        loss = sum(module.chunk_loss(c, module.streams.begin(c), None) for c in chunks)
        loss.backward()
        gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        return loss.detach(), gradients, module.streams.published

    expected, actual = losses_and_gradients(False), losses_and_gradients(True)
    # float32, other order of summation: a few units in the last place of the largest terms
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_rotary_frequencies_survive_true_bfloat16() -> None:
    right = make_module().model.rotary_emb.inv_freq
    module = make_module().bfloat16()
    assert torch.equal(module.model.rotary_emb.inv_freq, right)
    assert all(parameter.dtype == torch.bfloat16 for parameter in module.parameters())
    assert not torch.equal(right.bfloat16().float(), right), "power"


def test_relative_actions_are_absolute_again_without_an_index_on_the_host() -> None:
    module = make_module(features={"delta_actions": (2, 0)})
    plain = make_module()
    state = torch.randn(3, 5)
    first, other = (
        m.sample_actions(state, None, torch.Generator().manual_seed(2)) for m in (module, plain)
    )
    other[..., 0] += state[:, None, 0]
    other[..., 2] += state[:, None, 2]
    assert torch.equal(first, other)
