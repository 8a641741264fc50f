"""In-Place TTT inside decoders: the base bit for bit, placement, removal, beside TTT-LoRA."""

from __future__ import annotations

import copy

import pytest
import torch
from architecture_cases import ARCHITECTURES
from peft import get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from ttt_lora_tuner_cases import (
    EXACT,
    LENGTH,
    adapted,
    adapter_layers,
    add_in_place,
    add_ttt_lora,
    config_of,
    decode,
    logits,
    lora_config,
    plain_model,
    read_chunks,
    shake,
    text,
)

from lightning_modules.layers.in_place_mlp import InPlaceConfig, InPlaceMLP
from lightning_modules.models.in_place import InPlaceOptions, inject_in_place, remove_in_place
from lightning_modules.streams import FastState

GATED = ["gate_proj", "up_proj"]


def learning(model: nn.Module) -> dict[str, InPlaceMLP]:
    return {path: m for path, m in model.named_modules() if isinstance(m, InPlaceMLP)}


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.quick("llama-*", "*-True-dtype0", "gemma3-False-dtype2")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_starts_as_its_base_bit_for_bit_also_in_chunks(
    architecture: str, symmetric: bool, dtype: torch.dtype
) -> None:
    model, ids = plain_model(architecture, dtype), text()
    expected = logits(model, ids)
    whole = [logits(model, part) for part in ids.split([6, 7], dim=1)]
    add_in_place(model, symmetric=symmetric)
    assert torch.equal(logits(model, ids), expected)
    in_chunks, state = read_chunks(model, ids, [6, 7])
    assert torch.equal(in_chunks, torch.cat(whole, dim=1))
    assert list(state.outgoing) == [f"model.layers.{i}.mlp" for i in range(2)]
    assert not torch.equal(logits(shake(model), ids), expected)


@pytest.mark.parametrize(("every_n", "expected"), [(1, [0, 1]), (2, [1])])
def test_the_last_of_every_n_layers_learns(every_n: int, expected: list[int]) -> None:
    model = plain_model()
    paths = inject_in_place(model, InPlaceOptions(every_n=every_n))
    assert paths == list(learning(model)) == [f"model.layers.{i}.mlp" for i in expected]
    assert all(mlp.slot == path for path, mlp in learning(model).items())


def test_removing_gives_back_the_same_modules_and_takes_the_hooks_away() -> None:
    model, ids = plain_model(), text()
    before = {path: (id(m), list(m.state_dict())) for path, m in model.named_modules()}
    count, expected = hooks(model), logits(model, ids)
    add_in_place(model)
    shake(model)
    logits(model, ids)
    assert hooks(model) > count
    assert remove_in_place(model) == [f"model.layers.{i}.mlp" for i in range(2)]
    after = {path: (id(m), list(m.state_dict())) for path, m in model.named_modules()}
    assert after == before and hooks(model) == count
    assert torch.equal(logits(model, ids), expected)


def test_context_of_the_layer_equals_what_is_given_to_the_mlp_itself() -> None:
    """State, mask and documents reach the MLP, and the other layer's MLP has its own context."""
    model, ids = adapted("in_place"), text()
    seen: list[tuple[Tensor, Tensor]] = []
    first, second = learning(model).values()
    assert first.context is not second.context
    first.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, 7:] = 0, 0
    documents = (torch.arange(LENGTH) > 8).long().expand(2, -1)
    logits(model, ids, attention_mask=mask, document_ids=documents)
    x, out = seen[0]
    with torch.no_grad():
        first.context = None
        expected = first(x, mask=mask.bool(), document_ids=documents)
        assert (first(x) - expected).abs().max() > 1e-6
    assert torch.equal(out, expected)


# Beside other adapters


@pytest.mark.parametrize("first", ["in_place", "ttt_lora"])
def test_ttt_lora_in_gate_and_up_equals_one_pass_and_either_can_be_taken_away(first: str) -> None:
    model, ids = plain_model(dtype=torch.float64), text()
    base = logits(model, ids)
    if first == "in_place":
        add_in_place(model)
    add_ttt_lora(model, target_modules=GATED)
    if first == "ttt_lora":
        add_in_place(model)
    assert torch.equal(logits(model, ids), base)
    shake(model)
    expected, whole = decode(model, ids, [LENGTH])
    assert len(whole.slots) == 4
    torch.testing.assert_close(decode(model, ids, [5, 1, 7])[0], expected, **EXACT)
    remove_in_place(model)
    assert len(adapter_layers(model)) == 4 and not learning(model)
    alone = plain_model(dtype=torch.float64)
    add_ttt_lora(alone, target_modules=GATED)
    alone.load_state_dict(model.state_dict())
    expected, _ = decode(alone, ids, [LENGTH])
    torch.testing.assert_close(decode(model, ids, [5, 1, 7])[0], expected, **EXACT)
    mask = torch.ones_like(ids)
    mask[:, 9:] = 0  # its hooks are still there, and those for masks
    torch.testing.assert_close(
        logits(model, ids, attention_mask=mask)[:, :9], expected[:, :9], **EXACT
    )


def test_in_place_goes_on_learning_when_ttt_lora_is_unloaded() -> None:
    model, ids = plain_model(dtype=torch.float64), text()
    add_in_place(model)
    shake(model)
    expected, _ = decode(model, ids, [5, 8])
    wrapped = get_peft_model(model, config_of(target_modules=GATED))
    shake(wrapped, names=("cells",))
    assert (decode(wrapped, ids, [5, 8])[0] - expected).abs().max() > 1e-3
    assert torch.equal(decode(wrapped.unload(), ids, [5, 8])[0], expected)


@pytest.mark.parametrize("first", ["in_place", "ttt_lora"])
def test_ttt_lora_on_the_fast_weight_itself_is_refused(first: str) -> None:
    model = plain_model()
    if first == "in_place":
        add_in_place(model)
        with pytest.raises(ValueError, match=r"layers.0.mlp.down_proj is the fast weight of In-P"):
            add_ttt_lora(model)
        assert not adapter_layers(model)
        add_ttt_lora(model, exclude_modules=["down_proj"])
        assert len(adapter_layers(model)) == 12
    else:
        add_ttt_lora(model)
        with pytest.raises(TypeError, match=r"plain nn.Linear.*on gate_proj and up_proj"):
            add_in_place(model)
        assert not learning(model)


def test_lora_put_on_the_fast_weight_later_is_an_error_instead_of_passed_over() -> None:
    model = plain_model()
    add_in_place(model)
    inject_adapter_in_model(lora_config(target_modules=["down_proj"]), model)
    with pytest.raises(TypeError, match="down_proj has become a Linear, which.* pass over"):
        logits(model, text())


# Copies and bad input


def test_a_copy_agrees_and_has_contexts_of_its_own_also_after_training() -> None:
    model, ids = adapted("in_place"), text()
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    read_chunks(model, ids, [6, 7])[0].square().mean().backward()
    model.zero_grad()
    copied = copy.deepcopy(model)
    assert learning(copied)["model.layers.0.mlp"].context is not None
    for own, other in zip(learning(copied).values(), learning(model).values(), strict=True):
        assert own.context is not other.context
    expected, _ = decode(model.eval(), ids, [6, 7])
    assert torch.equal(decode(copied.eval(), ids, [6, 7])[0], expected)
    shake(copied)
    assert torch.equal(decode(model, ids, [6, 7])[0], expected)


def test_too_few_layers_and_other_mlps_are_errors_that_leave_the_model_alone() -> None:
    model = plain_model()
    with pytest.raises(ValueError, match=r"every_n=3, but LlamaForCausalLM has 2 layers"):
        inject_in_place(model, InPlaceOptions(every_n=3))
    with pytest.raises(ValueError, match=r"every_n=0 must be at least 1"):
        InPlaceOptions(every_n=0)
    model.model.layers[1].mlp = nn.Linear(32, 32)
    with pytest.raises(TypeError, match="Linear has no gate_proj"):
        inject_in_place(model, InPlaceOptions(every_n=1, layer=InPlaceConfig()))
    assert not learning(model) and hooks(model) == hooks(plain_model())
    with pytest.raises(TypeError, match="MoshiGatingMLP has no gate_proj"):
        add_in_place(plain_model("moshi"))


def test_monitors_learn_how_far_each_weight_has_moved() -> None:
    model, state = plain_model(), FastState(listening=["fast_weight"])
    add_in_place(model)
    shake(model)
    model(input_ids=text(), fast_state=state)
    for path, mlp in learning(model).items():
        published, dw = state.published["fast_weight"][path], state.outgoing[path]["dw"]
        assert (dw.flatten(1).norm(dim=1) > 0).all()
        torch.testing.assert_close(published["state_norm"], dw.flatten(1).norm(dim=1).unsqueeze(1))
        assert published["weight_norm"].item() == mlp.down_proj.weight.norm().item()
