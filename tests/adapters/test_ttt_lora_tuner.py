"""TTT-LoRA as a method of peft: the base bit for bit, files, named adapters, other methods."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from architecture_cases import ADAPTERS, WINDOW
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration
from ttt_lora_tuner_cases import (
    CELLS,
    EXACT,
    KNOWN,
    LENGTH,
    adapter_layers,
    add_ttt_lora,
    config_of,
    decode,
    logits,
    lora_config,
    peft_model,
    plain_model,
    read_chunks,
    shake,
    text,
)

from lightning_modules.adapters import inject_adapters, remove_adapters
from lightning_modules.layers.ttt_lora_size import parameter_count
from lightning_modules.streams import FastState

ROOT = Path(__file__).parents[2]
NAMES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def last_names(model: nn.Module) -> set[str]:
    return {path.rpartition(".")[2] for path in adapter_layers(model)}


# The base


@pytest.mark.quick("llama-*", "gemma3-dtype0", "moshi-dtype2")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("architecture", KNOWN)
def test_a_new_adapter_equals_the_base_bit_for_bit(architecture: str, dtype: torch.dtype) -> None:
    ids, base = text(), plain_model(architecture, dtype)
    expected = logits(base, ids)
    model = get_peft_model(base, config_of(inner_dim=None, match_rank=8)).eval()
    assert torch.equal(logits(model, ids), expected)
    groups = {place[0].slot for m in adapter_layers(model).values() for place in [_place(m)]}
    assert any(slot.endswith("q_proj+k_proj+v_proj.default") for slot in groups)
    inject_adapter_in_model(lora_config(target_modules="all-linear"), base)  # B is zero
    assert torch.equal(logits(model, ids), expected)
    assert not torch.equal(logits(shake(model), ids), expected)


def _place(layer: Any, name: str = "default") -> Any:
    return layer.ttt_lora_places[name]


@pytest.mark.quick("None-gemma3", "None-moshi", "all-linear-llama")
@pytest.mark.parametrize("architecture", KNOWN)
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_known_architectures_get_all_linear_layers_but_the_head(
    architecture: str, targets: str | None
) -> None:
    model = peft_model(architecture, target_modules=targets)
    layers = adapter_layers(model)
    linear = {p for p, m in plain_model(architecture).named_modules() if type(m) is nn.Linear}
    plain = {path.removeprefix("base_model.model.") for path in layers}
    assert plain == {path for path in linear if not path.endswith("lm_head")}
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable and all(f".{CELLS}." in name for name in trainable)
    assert len(trainable) == 9 * len(layers)
    expected, _ = decode(model.double(), text(), [LENGTH])
    # Gemma 2's softmax is float32, whatever the model is; the order of its sums depends on the CPU.
    close = EXACT | {"atol": 2e-6} if architecture == "gemma2" else EXACT
    torch.testing.assert_close(decode(model, text(), [5, 1, 7])[0], expected, **close)


def test_the_default_for_images_and_text_leaves_the_images_alone() -> None:
    text_config = {"vocab_size": 41, "hidden_size": 32, "intermediate_size": 48, "head_dim": 16}
    vision = {"hidden_size": 16, "intermediate_size": 24, "image_size": 28, "patch_size": 14}
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2}
    text_config = {**text_config, **sizes, "num_key_value_heads": 1, "sliding_window": WINDOW}
    config = Gemma3Config(text_config=text_config, vision_config={**vision, **sizes})
    model = get_peft_model(Gemma3ForConditionalGeneration(config), config_of())
    layers = adapter_layers(model)
    assert last_names(model) == NAMES and len(layers) == 7
    assert all("language_model" in path for path in layers)


@pytest.mark.parametrize("target", ["lm_head", ".*(q_proj|lm_head)"])
@pytest.mark.parametrize("lora", [False, True])
def test_the_output_embedding_named_explicitly_is_an_error(target: str, lora: bool) -> None:
    model = plain_model()
    if lora:
        inject_adapter_in_model(lora_config(target_modules=["lm_head"]), model)
    with pytest.raises(ValueError, match="lm_head, the output embedding.*exclude_modules"):
        add_ttt_lora(model, target_modules=[target] if "." not in target else target)
    assert not adapter_layers(model)


# Files


def test_saved_and_loaded_adapter_equals_the_first_bit_for_bit(tmp_path: Path) -> None:
    model, ids = peft_model(inner_dim_pattern={"q_proj": 5}, loss="plain"), text()
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.rpartition(f".{CELLS}.")[2] for name in tensors} == {
        *(f"theta_{name}.weight" for name in ("k", "q", "v", "out")),
        *("w_base", "b_base", "norm.weight", "norm.bias", "lr_gate"),
    }
    for options in ({"adapter_name": "x"}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        again = PeftModel.from_pretrained(plain_model(), tmp_path, **options).eval()
        assert torch.equal(logits(again, ids), expected)
        trainable = {name for name, p in again.named_parameters() if p.requires_grad}
        assert all(CELLS in name for name in trainable)
        assert bool(trainable) == ("is_trainable" in options)
    assert again.peft_config["default"].to_dict() == {
        **model.peft_config["default"].to_dict(),
        "inference_mode": False,
        "auto_mapping": again.peft_config["default"].auto_mapping,
        "base_model_name_or_path": again.peft_config["default"].base_model_name_or_path,
    }


@pytest.mark.slow
def test_another_process_loads_the_adapter_and_agrees(tmp_path: Path) -> None:
    model = peft_model()
    model.save_pretrained(tmp_path)
    torch.save(logits(model, text()), tmp_path / "logits.pt")
    code = (
        "import sys, torch; sys.path[:0] = ['tests', '.'];"
        "import lightning_modules.adapters.ttt_lora; from peft import PeftModel;"
        "from ttt_lora_tuner_cases import logits, plain_model, text; folder = sys.argv[1];"
        "model = PeftModel.from_pretrained(plain_model(), folder).eval();"
        "print(torch.equal(logits(model, text()), torch.load(folder + '/logits.pt')))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip().endswith("True"), done.stderr


def test_no_state_is_in_the_state_dict_after_streaming() -> None:
    model = peft_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    read_chunks(model, text(), [6, 7])
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    own = [name for name in before if CELLS in name]
    assert not [name for name in own if "pending" in name or "dw" in name or "seen" in name]


def test_count_printed_is_that_of_the_formula(capsys: pytest.CaptureFixture[str]) -> None:
    model = peft_model()
    layers = adapter_layers(model).values()
    expected = sum(parameter_count(m.in_features, m.out_features, 3) for m in layers)
    model.print_trainable_parameters()
    assert f"trainable params: {expected:,} ||" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{}, {"rate_per_token": True}, {"output_norm": False}])
@pytest.mark.parametrize("per", ["linear", "parent"])
def test_matched_adapters_have_at_most_the_parameters_of_lora(
    per: str, options: dict[str, bool]
) -> None:
    model = peft_model(inner_dim=None, match_rank=16, match_per=per, **options)
    own = sum(p.numel() for n, p in model.named_parameters() if CELLS in n)
    layers = adapter_layers(model).values()
    budget = sum(16 * (m.in_features + m.out_features) for m in layers)
    assert 0.5 * budget < own <= budget
    attention = model.base_model.model.model.layers[0].self_attn
    q, k = (layer.ttt_lora_cells["default"] for layer in (attention.q_proj, attention.k_proj))
    assert (q.inner_dim == k.inner_dim) == (per == "parent")


# The base an adapter belongs to


def test_the_fingerprint_is_of_the_base_alone_in_float32_and_bfloat16(tmp_path: Path) -> None:
    base = plain_model(dtype=torch.bfloat16)
    alone = get_peft_model(copy.deepcopy(base), config_of()).peft_config["default"]
    mixed = copy.deepcopy(base).float()
    inject_adapters(mixed, [("*", "lora", {"rank": 2})])
    inject_adapter_in_model(lora_config(), mixed)
    model = shake(get_peft_model(mixed, config_of()))
    model.add_adapter("second", second := config_of(inner_dim=2))
    assert alone.base_fingerprint is not None
    assert model.peft_config["default"].base_fingerprint == alone.base_fingerprint
    assert second.base_fingerprint == alone.base_fingerprint


def test_an_adapter_of_another_base_is_refused_unless_its_file_says_null(tmp_path: Path) -> None:
    peft_model().save_pretrained(tmp_path)
    other = plain_model(seed=1)
    with pytest.raises(ValueError, match=r"other weights.*null in its adapter_config.json"):
        PeftModel.from_pretrained(other, tmp_path)
    assert not adapter_layers(other)
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    assert len(saved["base_fingerprint"]) == 16
    file.write_text(json.dumps({**saved, "base_fingerprint": None}))
    assert adapter_layers(PeftModel.from_pretrained(other, tmp_path))


def test_weights_that_are_not_loaded_have_no_fingerprint() -> None:
    model = plain_model().to("meta")
    config = config_of()
    inject_adapter_in_model(config, model)
    assert config.base_fingerprint is None
    given = config_of(base_fingerprint="0" * 16)
    inject_adapter_in_model(given, plain_model().to("meta"))
    assert given.base_fingerprint == "0" * 16


# Named adapters, and those of other methods


def test_named_adapters_are_chosen_disabled_and_deleted() -> None:
    ids, base = text(), logits(plain_model(), text())
    model = peft_model(target_modules=["q_proj", "v_proj"])
    first = logits(model, ids)
    model.add_adapter("other", config_of("B_ln", inner_dim=2, target_modules=["q_proj", "up_proj"]))
    shake(model, seed=5, names=("cells.other",))
    assert torch.equal(logits(model, ids), first)
    model.set_adapter("other")
    other = logits(model, ids)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(f"{CELLS}.other." in name for name in trainable)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model, ids)
    results = [base, first, other, both]
    assert not [1 for i, a in enumerate(results) for b in results[:i] if torch.equal(a, b)]
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), base)
    model.set_adapter("default")
    assert torch.equal(logits(model, ids), first)
    model.delete_adapter("default")
    model.set_adapter("other")
    assert torch.equal(logits(model, ids), other)
    assert not [n for n in model.state_dict() if f"{CELLS}.default" in n]


def test_adapters_put_in_by_two_tuners_both_compute() -> None:
    model, ids = plain_model(), text()
    inject_adapter_in_model(config_of(target_modules=["q_proj", "k_proj"]), model, "first")
    shake(model)
    expected, state = read_chunks(model, ids, [LENGTH])
    inject_adapter_in_model(lora_config(target_modules=["up_proj"]), model, "first")
    inject_adapter_in_model(config_of(target_modules=["o_proj"]), model, "second")
    for layer in adapter_layers(model).values():
        layer.set_adapter(["first", "second"])  # peft activates the last one alone
    actual, other = read_chunks(model, ids, [LENGTH])
    assert torch.equal(actual, expected)
    assert other.outgoing.keys() > state.outgoing.keys()
    shake(model, names=("cells.second",))
    assert not torch.equal(logits(model, ids), expected)


def test_unload_gives_back_the_same_linear_layers_and_no_hooks() -> None:
    base = plain_model()
    layers = {path: m for path, m in base.named_modules() if type(m) is nn.Linear}
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in base.modules())
    expected = logits(base, text())
    model = shake(get_peft_model(base, config_of()).eval())
    model.base_model.model.generate(text(), max_new_tokens=2, use_cache=False)
    restored = model.unload()
    assert restored is base and torch.equal(logits(restored, text()), expected)
    assert all(restored.get_submodule(path) is layer for path, layer in layers.items())
    after = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in restored.modules()]
    assert sum(after) == hooks
    assert restored.generate(text(), max_new_tokens=2).shape == (2, LENGTH + 2)


@pytest.mark.parametrize("order", ["lora_first", "lora_last"])
def test_lora_on_the_same_layer_adds_to_it(order: str) -> None:
    model, ids = plain_model(dtype=torch.float64), text()
    steps = [lambda: add_ttt_lora(model), lambda: inject_adapter_in_model(lora_config(), model)]
    for step in steps if order == "lora_last" else steps[::-1]:
        step()
    shake(model, names=(CELLS, "lora_"))
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(2, LENGTH, 32, dtype=torch.float64)
    assert layer.get_base_layer().weight.shape == (48, 32)
    inner = layer.base_layer
    ttt, lora = (layer, inner) if order == "lora_first" else (inner, layer)
    with torch.no_grad():
        y, (group, number) = ttt.get_base_layer()(x), ttt.ttt_lora_places["default"]
        both = layer(x)
        group.context.enter()
        added = ttt.ttt_lora_cells["default"].output(0 * y, group.read(number, x)[0])
        low = 2.0 * lora.lora_B["default"](lora.lora_A["default"](x))
    torch.testing.assert_close(both, y + added + low, **EXACT)
    assert added.abs().max() > 1e-2 and low.abs().max() > 1e-2
    expected, _ = decode(model, ids, [LENGTH])
    torch.testing.assert_close(decode(model, ids, [6, 7])[0], expected, **EXACT)


def test_merging_is_refused_and_leaves_the_model_as_it_was() -> None:
    model = peft_model()
    inject_adapter_in_model(lora_config(), model.base_model.model)
    shake(model, names=("lora_",))
    expected = logits(model, text())
    layer = next(iter(adapter_layers(model).values()))
    for merge in (model.merge_and_unload, model.merge_adapter, layer.merge):
        with pytest.raises(ValueError, match="cannot be merged.*unload"):
            merge()
    assert torch.equal(logits(model, text()), expected)


# Adapters of attention


def with_attention_adapter(first: str) -> Any:
    model = plain_model(dtype=torch.float64)
    plan = [("*", "ttt", ADAPTERS["ttt"].options)]
    for step in ("attention", "linear") if first == "attention" else ("linear", "attention"):
        if step == "attention":
            inject_adapters(model, plan)
        else:
            add_ttt_lora(model)
    return shake(model, names=(CELLS,))


def test_attention_adapters_put_in_first_equal_one_pass_and_can_be_removed() -> None:
    model, ids = with_attention_adapter("attention"), text()
    assert len(adapter_layers(model)) == 14  # none in the adapter's own linear layers
    expected, whole = decode(model, ids, [LENGTH])
    actual, cache = decode(model, ids, [6, 1, 6])
    torch.testing.assert_close(actual, expected, **EXACT)
    torch.testing.assert_close(cache.slots, whole.slots, **EXACT)
    mask = torch.ones_like(ids)
    mask[:, 9:] = 0
    padded = logits(model, ids, attention_mask=mask)[:, :9]
    torch.testing.assert_close(padded, logits(model, ids[:, :9]), **EXACT)
    remove_adapters(model)
    alone = plain_model(dtype=torch.float64)
    add_ttt_lora(alone)
    shake(alone, names=(CELLS,))
    torch.testing.assert_close(logits(model, ids), logits(alone, ids), **EXACT)
    torch.testing.assert_close(
        decode(model, ids, [6, 7])[0], decode(alone, ids, [6, 7])[0], **EXACT
    )


@pytest.mark.parametrize("given", ["fast_state", "attention_mask"])
def test_attention_adapters_put_in_last_are_an_error_until_they_are_removed(given: str) -> None:
    model, ids = with_attention_adapter("linear"), text()
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    call = {"fast_state": FastState()} if given == "fast_state" else {"attention_mask": mask}
    with pytest.raises(RuntimeError, match="did not reach all of its layers: put attention"):
        logits(model, ids, **call)
    remove_adapters(model)
    assert logits(model, ids, **call).shape == (2, LENGTH, 41)
