"""Plans of adapters in the action expert, against the plain options and the adapters themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import KINDS, LORA, member, own_parameters
from expert_cases import HORIZON
from expert_cases import make_chunk as make_state_chunk
from expert_cases import make_module as make_state
from pi0_cases import make_chunk as make_pi0_chunk
from pi0_cases import make_pi0
from torch import Tensor

from lightning_modules.action_expert import CHECKPOINT_KEY, ActionExpertModule
from lightning_modules.adapters import (
    AdapterSpec,
    LoRAAttentionAdapter,
    TTTAdapterConfig,
    TTTAttentionAdapter,
)
from lightning_modules.layers.ttt import TTTConfig
from lightning_modules.policy import ActionExpertPolicy
from lightning_modules.streams import NO_STREAM, FastState, StreamPlan

TTT = member("ttt", layer={"num_heads": 2})
GATED = member("ttt", ttt_gate="adarms_tanh", ttt_input_norm="adarms", layer={"num_heads": 2})
DENSE = member("ttt", ttt_gate="adarms", layer={"num_heads": 2})
ROUTED = member(
    "routed",
    members={"fast": TTT, "low": LORA, "nothing": member("noop")},
    balance_coefficient=0.1,
    z_coefficient=0.1,
)


def make_pi0_planned(**options: Any) -> ActionExpertModule:
    return make_pi0(adarms=True, with_ttt=options.pop("with_ttt", True), module=options)


MAKE: dict[str, Callable[..., ActionExpertModule]] = {"state": make_state, "pi0": make_pi0_planned}
CHUNK = {"state": make_state_chunk, "pi0": make_pi0_chunk}


def planned(backbone: str, *lines: AdapterSpec, **options: Any) -> ActionExpertModule:
    return MAKE[backbone](with_ttt=False, adapters=list(lines), **options)


def sites(module: ActionExpertModule) -> dict[int, str]:
    layers = module.model.decoder.layers
    return {index: type(layer.self_attn).__name__ for index, layer in enumerate(layers)}


def loss(module: ActionExpertModule, chunk: dict[str, Any], fast_state: FastState) -> Tensor:
    return module.chunk_loss(chunk, fast_state, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("backbone", MAKE)
def test_a_line_with_ttt_is_what_the_plain_options_are(backbone: str) -> None:
    plain = MAKE[backbone](ttt_layer_positions=[1])
    line = planned(backbone, AdapterSpec("layers.1.*", **TTT))
    assert plain.state_dict().keys() == line.state_dict().keys()
    line.load_state_dict(plain.state_dict())
    chunk = CHUNK[backbone]()
    losses = [loss(module, chunk, FastState.transient()) for module in (plain, line)]
    assert torch.equal(*losses)
    groups = [{n: m.parameter_group(n) for n, _ in m.named_parameters()} for m in (plain, line)]
    assert groups[0] == groups[1]


@pytest.mark.parametrize("pattern", [0, [0], "layers.[02].self_attn", "*0*"])
def test_patterns_choose_layers_and_ttt_takes_others(pattern: Any) -> None:
    module = make_state(ttt_layer_positions=[1], adapters=[AdapterSpec(pattern, **LORA)])
    assert sites(module) == {0: LoRAAttentionAdapter.__name__, 1: TTTAttentionAdapter.__name__}


@pytest.mark.parametrize("backbone", MAKE)
def test_the_size_of_the_condition_is_filled_in_at_any_depth(backbone: str) -> None:
    inner = member("series", members={"low": LORA, "deep": DENSE})
    kind = member("routed", members={"gated": GATED, "chain": inner, "plain": TTT})
    module = planned(backbone, AdapterSpec("*", **kind))
    size = module.model.cond_size
    for layer in module.model.decoder.layers:
        routed = layer.self_attn
        assert routed.members.gated.adapter_config.cond_size == size
        assert routed.members.chain.members.deep.adapter_config.cond_size == size
        assert routed.members.plain.adapter_config.cond_size is None, "needs none"
    fast_state = FastState.transient()
    loss(module.train(), CHUNK[backbone](), fast_state).backward()
    assert all(p.grad is not None for p in own_parameters(module).values())


def test_a_condition_that_is_missing_or_of_another_size_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs cond_size"):
        planned("state", AdapterSpec("*", **GATED), expert={"adarms": False})
    wrong = member("parallel", members={"a": member("ttt", ttt_gate="adarms", cond_size=5)})
    with pytest.raises(ValueError, match="member 'a': ttt: cond_size=5, .* has 16 channels"):
        planned("state", AdapterSpec("*", **wrong))


def expected_group(name: str) -> str:
    """By its name, for the kinds of `test_every_adapter_parameter_...`."""
    leaf = name.rsplit(".", 1)[-1]
    if ".router." in name or ".ttt_gate." in name:
        return "gate"
    fast = {"W1", "b1", "W2", "b2", "learnable_ttt_lr_weight", "learnable_ttt_lr_bias"}
    return "fast" if leaf in fast else "adapter"


@pytest.mark.quick("*-state", "nested-pi0")
@pytest.mark.parametrize("backbone", MAKE)
@pytest.mark.parametrize("kind", [*KINDS, "gated", "named"])
def test_every_adapter_parameter_is_in_a_group_and_none_of_the_base(
    backbone: str, kind: str
) -> None:
    members = {"gate": LORA, "router": LORA, "ttt": LORA, "ttt_gate": LORA}
    kinds = {**KINDS, "gated": GATED, "named": member("parallel", members=members)}
    module = planned(backbone, AdapterSpec([1], **kinds[kind]))
    own = own_parameters(module)
    assert own
    for name, _ in module.named_parameters():
        wanted = expected_group(name) if name in own else "base"
        if kind == "named" and name in own:
            wanted = "adapter"  # whatever the members are called
        assert module.parameter_group(name) == wanted, name


def test_low_rank_updates_by_peft_below_an_adapter_are_of_the_group_adapter() -> None:
    module = make_pi0(train="lora", with_ttt=False, module={"adapters": [AdapterSpec(0, **TTT)]})
    below = [n for n, _ in module.named_parameters() if "base_attention" in n]
    assert {module.parameter_group(n) for n in below if ".lora_" in n} == {"adapter"}
    assert {module.parameter_group(n) for n in below if ".lora_" not in n} == {"base"}


@pytest.mark.parametrize("backbone", MAKE)
def test_losses_of_routers_reach_training_and_its_log(backbone: str) -> None:
    module = planned(backbone, AdapterSpec("*", **ROUTED)).train()
    logged: dict[str, Tensor] = {}
    module.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[assignment]
    module.streams.begin_step("train")
    torch.manual_seed(0)
    total = module.training_step([CHUNK[backbone]()], 0)
    assert logged["train/router_balance"] > 0 and logged["train/router_z"] > 0
    torch.testing.assert_close(total.detach(), sum(logged.values()))
    total.backward()
    routers = {n: p for n, p in module.named_parameters() if ".router." in n}
    assert routers and all(p.grad.abs().max() > 0 for p in routers.values())
    module.eval()
    fast_state = FastState.transient()
    loss(module, CHUNK[backbone](), fast_state)
    assert not fast_state.losses


def with_idle(chunk: dict[str, Any], row: int) -> dict[str, Any]:
    ids = tuple(NO_STREAM if i == row else id_ for i, id_ in enumerate(chunk["plan"].stream_id))
    plan = StreamPlan(ids, chunk["plan"].chunk_index, chunk["plan"].is_first)
    return {**chunk, "stream_id": torch.tensor(ids), "plan": plan}


@pytest.mark.parametrize("top_k", [None, 1])
def test_rows_without_a_file_do_not_count_in_the_losses_of_routers(top_k: int | None) -> None:
    kind = {**ROUTED, "adapter_config": {**ROUTED["adapter_config"], "top_k": top_k}}
    module = planned("state", AdapterSpec("*", **kind)).train()
    chunk = make_state_chunk()
    rest = {k: v[:2] for k, v in chunk.items() if isinstance(v, Tensor)}
    rest["plan"] = StreamPlan(*(values[:2] for values in chunk["plan"]))
    noisy, time = torch.randn(3, HORIZON, 3), torch.rand(3)

    def losses(chunk: dict[str, Any], rows: int) -> dict[str, dict[str, Tensor]]:
        module.streams.begin_step("train")
        handle = module.streams.begin(chunk)
        state = chunk["observation.state"]
        module.model(state, noisy[:rows], time[:rows], fast_state=handle)
        return handle.losses

    idle, alone = losses(with_idle(chunk, 2), 3), losses(rest, 2)
    torch.testing.assert_close(idle, alone)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(losses(chunk, 3), alone)  # power: the row would count
    none = with_idle(with_idle(with_idle(chunk, 0), 1), 2)
    assert all(value == 0 for fields in losses(none, 3).values() for value in fields.values())


@pytest.mark.slow
def test_compiled_training_equals_eager_with_the_losses_of_a_router() -> None:
    def total_and_gradients(compiled: bool) -> tuple[Tensor, dict[str, Tensor | None]]:
        module = planned("state", AdapterSpec(0, **ROUTED), ttt_state="carry_episode").train()
        module.log = lambda *_, **__: None  # type: ignore[assignment]
        if compiled:
            torch.compiler.reset()
            module.model.compile(backend="aot_eager")
        module.streams.begin_step("train")
        torch.manual_seed(0)
        total = module.training_step([make_state_chunk(index) for index in range(2)], 0)
        total.backward()
        return total.detach(), {n: p.grad for n, p in module.named_parameters()}

    # float32, other order of summation
    expected, actual = total_and_gradients(False), total_and_gradients(True)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.quick("routed-state", "plain-state", "dataclass-state", "nested-pi0")
@pytest.mark.parametrize("backbone", MAKE)
@pytest.mark.parametrize("kind", ["routed", "nested", "plain", "dataclass"])
def test_a_checkpoint_carries_the_plan_to_policy_and_fresh_module(
    backbone: str, kind: str, tmp_path: Path
) -> None:
    spec = {
        "plain": GATED,
        "dataclass": {
            "adapter_type": "ttt",
            "adapter_config": TTTAdapterConfig(layer=TTTConfig(num_heads=2)),
        },
        **{k: KINDS[k] for k in ("routed", "nested")},
    }[kind]
    options = {"ttt_layer_positions": [0], "with_ttt": True, "ttt_state": "carry_episode"}
    lines = [AdapterSpec(1, **spec)]
    module = MAKE[backbone](adapters=lines, **options).eval()
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    policy = ActionExpertPolicy.from_checkpoint(tmp_path / "a.ckpt", seed=3)
    assert sites(policy.module) == sites(module)
    again: dict[str, Any] = {"state_dict": {}}
    policy.module.on_save_checkpoint(again)
    assert again[CHECKPOINT_KEY] == torch.load(tmp_path / "a.ckpt")[CHECKPOINT_KEY]
    chunk = CHUNK[backbone]()
    acts = [
        m.sample_actions(chunk, FastState.transient(), torch.Generator().manual_seed(1))
        for m in (module, policy.module)
    ]
    assert torch.equal(*acts)


def test_a_checkpoint_from_before_there_were_plans_has_none() -> None:
    module = make_state()
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    del checkpoint[CHECKPOINT_KEY]["options"]["adapters"]
    assert ActionExpertModule.rebuild(checkpoint).adapters == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"adapters": [AdapterSpec(0, "lorra")]},
            "unknown adapter .*; did you mean 'lora'",
        ),
        (
            {"adapters": [AdapterSpec(0, "noop"), AdapterSpec(1, "lora", {"rnk": 2})]},
            r"adapters\[1\]: lora: unknown option 'rnk'; did you mean 'rank'",
        ),
        (
            {"adapters": [AdapterSpec("*", **member("series", members={"a": member("tt")}))]},
            r"adapters\[0\]: member 'a': unknown adapter type 'tt'; .* did you mean 'ttt'",
        ),
        ({"adapters": [{"patern": 0, "adapter_type": "noop"}]}, "did you mean 'pattern'"),
        (
            {"adapters": [AdapterSpec("*", "lora")]},
            r"layer 0 would get two adapters, from adapters\[0\] and from ttt_layer_positions",
        ),
        (
            {"with_ttt": False, "adapters": [AdapterSpec(1, "lora"), AdapterSpec("*", "noop")]},
            r"layer 1 .* from adapters\[0\] and from adapters\[1\] \(pattern '\*'\): take it out",
        ),
        (
            {"adapters": [AdapterSpec(2, "noop")]},
            "layer 2 is not there; the decoder.* 0 to 1",
        ),
        ({"adapters": [AdapterSpec(-1, "noop")]}, "layer -1 is not there"),
        ({"adapters": [AdapterSpec([], "noop")]}, "no layer is given"),
        ({"adapters": [AdapterSpec("layer.*", "noop")]}, "fits no layer; there are layers.0.self_"),
    ],
)
@pytest.mark.parametrize("backbone", MAKE)
def test_a_wrong_plan_names_line_cause_and_fix(
    backbone: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MAKE[backbone](**options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[{pattern: 0, adapter_type: lorra}]", "unknown adapter type 'lorra'; known types are"),
        ("[{pattern: 0, adapter_type: lora, adapter_config: {rnk: 2}}]", "did you mean 'rank'?"),
        ("[{patern: 0, adapter_type: lora}]", "patern"),
        ("[{pattern: 0, adapter_type: lora}]", "layer 0 would get two adapters"),
        ("[{pattern: 'layer.*', adapter_type: lora}]", "fits no layer; there are layers.0.self"),
    ],
)
def test_a_wrong_plan_ends_the_command_line_in_one_line(
    value: str, message: str, run_cli: Callable[..., Any], tmp_path: Path
) -> None:
    files = ("--config", "configs/quickstart.yaml", "--config", "configs/tiny/action_expert.yaml")
    result = run_cli("fit", *files, f"--model.adapters={value}")
    assert result.code in (1, 2)
    assert message in result.last_line, result.err
    assert not (tmp_path / "runs").exists()
