"""TTT-LoRA in a model: wrong input is refused before anything changes, copies are their own."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import nn
from ttt_lora_tuner_cases import (
    adapter_layers,
    add_ttt_lora,
    config_of,
    plain_model,
    read_chunks,
    shake,
    text,
)

from lightning_modules.adapters.ttt_lora import TTTLoraConfig

# Bad input


class Attention(nn.Module):
    """Calls its projections with different inputs, or one of them twice."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(4, 4), nn.Linear(4, 4)
        self.twice = twice

    def forward(self, hidden_states: Any) -> Any:
        y = self.q_proj(hidden_states)
        return self.q_proj(y) if self.twice else y + self.k_proj(hidden_states + 1)


class Layer(nn.Module):
    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.self_attn = Attention(twice)

    def forward(self, x: Any) -> Any:
        return self.self_attn(hidden_states=x)


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("twice", [False, True])
def test_siblings_with_other_inputs_and_layers_called_twice_are_errors(
    twice: bool, group: bool
) -> None:
    model = Layer(twice)
    inject_adapter_in_model(
        config_of(target_modules=["q_proj", "k_proj"], group_siblings=group), model
    )
    x = torch.randn(2, 5, 4)
    if not twice and not group:
        assert torch.equal(model(x), model(x))
        return
    message = "more than once" if twice else "different inputs: set group_siblings=False"
    with pytest.raises(ValueError, match=message):
        model(x)


class IntLinear(nn.Linear):
    """As a quantised layer: not nn.Linear itself."""


def quantised(kind: str) -> Any:
    model = plain_model()
    mlp = model.model.layers[1].mlp
    if kind == "class":
        mlp.down_proj = IntLinear(48, 32)
    elif kind == "int":
        mlp.down_proj.weight = nn.Parameter(torch.zeros(32, 48, dtype=torch.int8), False)
    else:
        mlp.down_proj = nn.Embedding(4, 32)
    return model


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "near": ({"target_modules": ["q_prj", "upproj"]}, r"named .*q_proj.*up_proj"),
    "none": ({"target_modules": ["zzz"]}, r"match no layer of LlamaForCausalLM: .*down_proj"),
    "layers": ({"layers_to_transform": [7]}, r"in layers_to_transform=\[7\]"),
    "match": ({"inner_dim": None, "match_rank": 1}, r"layers.0.self_attn.q_proj.*higher rank"),
    "pattern": ({"inner_dim_pattern": {"qproj": 2}}, "'qproj' matches none of the layers.*q_proj"),
}


def modules_of(model: nn.Module) -> list[tuple[str, int]]:
    return [(path, id(module)) for path, module in model.named_modules()]


@pytest.mark.parametrize("case", BAD)
def test_bad_options_name_the_cause_and_leave_the_model_alone(case: str) -> None:
    options, message = BAD[case]
    model = plain_model()
    before = modules_of(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config_of(**options))
    assert modules_of(model) == before


@pytest.mark.parametrize("kind", ["class", "int", "embedding"])
def test_layers_that_are_not_linear_are_refused_before_any_is_replaced(kind: str) -> None:
    model = quantised(kind)
    before = modules_of(model)
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj is a .*not a plain nn.Linear"):
        get_peft_model(model, config_of())
    assert modules_of(model) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mini_batch_size": 0}, "mini_batch_size=0"),
        ({"match_per": "row"}, "linear or parent"),
        ({"inner_dim": 0}, "inner_dim=0 must be at least 1"),
        ({"inner_dim_pattern": {"q_proj": 0}}, "inner_dim_pattern={'q_proj': 0}"),
        ({"match_rank": 0}, "match_rank=0"),
        ({"layers_pattern": "layers"}, "give both"),
    ],
)
def test_wrong_option_names_the_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TTTLoraConfig(**options)


# Copies


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("trained", [False, True])
def test_copies_agree_and_share_nothing_with_the_original(how: str, trained: bool) -> None:
    model, ids = plain_model(), text()
    add_ttt_lora(model)
    shake(model)
    if trained:  # recomputed layers hold on to the tensors of their call
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        read_chunks(model, ids, [6, 7])[0].square().mean().backward()
        model.zero_grad()
        model.disable_input_require_grads()  # transformers' hook cannot be pickled
    if how == "deepcopy":
        copied = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    expected, state = read_chunks(model.eval(), ids, [6, 7])
    shared = {id(m.ttt_lora_places["default"][0].context) for m in adapter_layers(model).values()}
    own = {id(m.ttt_lora_places["default"][0].context) for m in adapter_layers(copied).values()}
    assert len(own) == len(shared) == 2 and not own & shared
    actual, same = read_chunks(copied.eval(), ids, [6, 7])
    assert torch.equal(actual, expected)
    torch.testing.assert_close(same.outgoing, state.outgoing, rtol=0, atol=0)
    shake(copied)
    assert torch.equal(read_chunks(model, ids, [6, 7])[0], expected)


@pytest.mark.slow
def test_compiled_model_agrees_with_eager_and_is_compiled_once_for_each_kind_of_call() -> None:
    model, ids = plain_model(), text(2, 18)
    add_ttt_lora(model, layers_to_transform=[1], target_modules=["q_proj", "k_proj", "o_proj"])
    shake(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=False):
        for _ in range(2):  # without a state, and with one
            expected, _ = read_chunks(model, ids, [6, 6, 6])
            actual, _ = read_chunks(compiled, ids, [6, 6, 6])
            assert torch.equal(actual, expected)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            read_chunks(compiled, ids, [6, 6, 6])
    torch._dynamo.reset()
