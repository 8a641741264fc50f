"""TTTLoRAModule: what each method trains and keeps, exact resuming, options and data that fit."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lact_module_cases import CHUNK, Trace, adamw, make_data, make_trainer, save_pretrained
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from ttt_lora_module_cases import (
    IN_PLACE_CHUNK,
    LLAMA,
    METHODS,
    assert_same_weights,
    base_weights,
    hash_of_base,
    make_module,
    train,
)

from lightning_modules.base import ParameterGroup
from lightning_modules.models.pretrained import PretrainedOptions
from lightning_modules.ttt_lora import TTTLoRAModule

FEATURES = {"vocab_size": 259, "chunk_length": CHUNK, "tbptt": 1, "mode": "stream"}


@pytest.fixture
def pretrained(tmp_path: Path) -> str:
    return save_pretrained(tmp_path)


def validate(folder: Path, module: TTTLoRAModule, **data: Any) -> float:
    trainer = make_trainer(folder, 1, limit_val_batches=1.0)
    return trainer.validate(module, make_data(folder, **data), verbose=False)[0]["val/loss"]


@pytest.mark.quick("in_place", "ttt_lora+lora")
@pytest.mark.parametrize("method", METHODS)
def test_a_method_starts_as_the_base_trains_what_it_adds_and_leaves_the_base_alone(
    method: str, pretrained: str, tmp_path: Path
) -> None:
    plain = make_module("none", pretrained=pretrained)
    module = make_module(method, pretrained=pretrained)
    assert validate(tmp_path, module) == validate(tmp_path, plain)
    before, start = hash_of_base(module), dict(module.state_dict())
    start = {name: value.clone() for name, value in start.items()}
    assert before == hash_of_base(plain)
    trace = train(tmp_path, module, 4, {"tbptt": 2})
    assert hash_of_base(module) == before
    after = module.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, start[name])}
    own = {name for name, p in module.named_parameters() if p.requires_grad}
    assert own and changed - {n for n in changed if n.startswith("means.")} == own
    assert {module.parameter_group(name) for name in own} == METHODS[method]
    assert len(set(trace.losses.values())) == 4


def test_power_a_base_that_moves_has_another_hash(pretrained: str) -> None:
    module = make_module("lora", pretrained=pretrained)
    module.build({**FEATURES, "vocab_size": 300})
    before = hash_of_base(module)
    weight = base_weights(module.model)["model.layers.1.mlp.down_proj.weight"]
    with torch.no_grad():
        weight[3, 4] = weight[3, 4].nextafter(torch.tensor(9.0))
    assert hash_of_base(module) != before


def test_nothing_added_to_a_frozen_model_leaves_nothing_to_train(
    pretrained: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="no parameter is left to train"):
        train(tmp_path, make_module("none", pretrained=pretrained), 1)


@pytest.mark.quick("none", "ttt_lora")
@pytest.mark.parametrize("method", ["none", *METHODS])
def test_from_scratch_the_base_is_trained_too(method: str, tmp_path: Path) -> None:
    module = make_module(method)
    trainer = make_trainer(tmp_path, 2)
    trainer.fit(module, make_data(tmp_path, tbptt=2))
    still = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.abs().max()]
    assert not still
    groups = {group["name"].split("/")[0] for group in trainer.optimizers[0].param_groups}
    assert groups == METHODS.get(method, set()) | {"base"}
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    stored = torch.load(tmp_path / "saved.ckpt", weights_only=True)["state_dict"]
    assert {f"model.{name}" for name in module.model.state_dict()} <= set(stored)


@pytest.mark.parametrize("method", ["ttt_lora+lora", "in_place"])
def test_groups_have_their_rates_and_decay(method: str, tmp_path: Path) -> None:
    names = sorted(METHODS[method] | {"base"})
    groups = {name: ParameterGroup(lr_scale=2.0 + n, weight_decay=0.1 * (n + 1))
              for n, name in enumerate(names)}  # fmt: skip
    module, trainer = make_module(method, groups=groups), make_trainer(tmp_path, 1)
    trainer.fit(module, make_data(tmp_path))
    found = {group["name"]: group for group in trainer.optimizers[0].param_groups}
    # Fast weights and step sizes never decay; LoRA and In-Place have no norms and no biases.
    expected = {"ttt_lora+lora": {"base", "base/no_decay", "theta", "theta/no_decay",
                                  "fast/no_decay", "gate/no_decay", "lora"},
                "in_place": {"base", "base/no_decay", "in_place"}}[method]  # fmt: skip
    assert set(found) == expected
    for name, group in found.items():
        options = groups[name.split("/")[0]]
        decay = 0.0 if name.endswith("no_decay") else options.weight_decay
        assert group["initial_lr"] == pytest.approx(1e-2 * options.lr_scale)
        assert group["weight_decay"] == pytest.approx(decay)
    grouped = [id(p) for group in found.values() for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in module.parameters())
    frozen = make_module(method, groups={"base": ParameterGroup(frozen=True)})
    before = train(tmp_path, frozen, 0) and hash_of_base(frozen)
    train(tmp_path, frozen, 2)
    assert hash_of_base(frozen) == before


class SaveAll(Trace):
    """Saves a checkpoint after every step."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.save_after, folder = trainer.global_step, self.path
        self.path = folder / f"{trainer.global_step}.ckpt"
        super().on_train_batch_end(trainer, *args)
        self.path = folder


@pytest.mark.quick("ttt_lora-1")
@pytest.mark.parametrize("tbptt", [1, 2])
@pytest.mark.parametrize("method", ["ttt_lora", "in_place"])
def test_stopped_after_any_step_equals_never_stopped(
    method: str, tbptt: int, pretrained: str, tmp_path: Path
) -> None:
    steps, data = 5, {"tbptt": tbptt}
    whole = make_module(method, pretrained=pretrained)
    trace = train(tmp_path, whole, steps, data, trace=SaveAll(path=tmp_path))
    inside = 0
    for stop in range(1, steps):
        path = tmp_path / f"{stop}.ckpt"
        rows = torch.load(path, weights_only=True)["streams"][0]["streams"]
        pending = [fields["pending_count"] for fields in rows["slots"].values()]
        inside += any(int(count.max()) for count in pending) and max(rows["chunk_index"]) > 0
        again = make_module(method, seed=stop, pretrained=pretrained)
        rest = train(tmp_path, again, steps, data, checkpoint=path)
        assert rest.losses == {n: loss for n, loss in trace.losses.items() if n > stop}
        assert_same_weights(again, whole)
        assert_same_streams(again, whole)
    assert inside >= 2, "no stop inside of a file and of a mini-batch"


def assert_same_streams(first: TTTLoRAModule, second: TTTLoRAModule) -> None:
    one, other = first.streams.state_dict(), second.streams.state_dict()
    slots = one.pop("slots"), other.pop("slots")
    assert one == other and slots[0].keys() == slots[1].keys() and slots[0]
    for name, fields in slots[0].items():
        assert all(torch.equal(value, slots[1][name][key]) for key, value in fields.items())


@pytest.mark.parametrize(
    ("data", "fix"),
    [({"batch_size": 3}, "batch_size=2"), ({"batch_size": 1}, "batch_size=2"),
     ({"tbptt": 2}, "tbptt=1")],
)  # fmt: skip
def test_resuming_with_other_rows_names_the_fix(
    data: dict[str, Any], fix: str, pretrained: str, tmp_path: Path
) -> None:
    path = tmp_path / "saved.ckpt"
    train(tmp_path, make_module("in_place", pretrained=pretrained), 2, trace=Trace(2, path))
    trace = Trace()
    with pytest.raises(ValueError, match=f"resume with data.init_args.{fix}"):
        again = make_module("in_place", pretrained=pretrained)
        train(tmp_path, again, 4, data, checkpoint=path, trace=trace)
    assert not trace.losses


@pytest.mark.quick("ttt_lora")
@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_changes_no_bit(
    method: str, pretrained: str, tmp_path: Path
) -> None:
    modules, traces, calls = [], [], {True: 0, False: 0}
    for recompute in (False, True):
        base = PretrainedOptions(pretrained, gradient_checkpointing=recompute)
        module = make_module(method, pretrained=base)
        module.build({**FEATURES, "vocab_size": 300, "tbptt": 2})

        def count(*_: Any, key: bool = recompute) -> None:
            calls[key] += 1

        module.model.model.layers[0].input_layernorm.register_forward_hook(count)
        traces.append(train(tmp_path, module, 4, {"tbptt": 2}).losses)
        modules.append(module)
    assert calls == {False: 8, True: 16}, "layers are not recomputed"
    assert traces[0] == traces[1]
    assert_same_weights(*modules)


@pytest.mark.quick("in_place")
@pytest.mark.parametrize("method", ["ttt_lora", "in_place"])
def test_validation_in_the_middle_leaves_training_bit_identical(
    method: str, pretrained: str, tmp_path: Path
) -> None:
    whole = make_module(method, pretrained=pretrained)
    expected = train(tmp_path, whole, 5)
    validated = make_module(method, pretrained=pretrained)
    often = {"limit_val_batches": 3, "num_sanity_val_steps": 2, "val_check_interval": 1}
    found = train(tmp_path, validated, 5, check_val_every_n_epoch=None, **often)
    assert validated.means["val_loss"].count > 0 or "val/loss" in validated.trainer.logged_metrics
    assert found.losses == expected.losses
    parameters = dict(whole.named_parameters())
    assert all(torch.equal(p, parameters[n]) for n, p in validated.named_parameters())
    assert_same_streams(validated, whole)


@pytest.mark.quick("in_place")
@torch.no_grad()
@pytest.mark.parametrize("method", ["ttt_lora", "in_place"])
def test_reset_reads_every_chunk_by_itself_and_carry_does_not(
    method: str, pretrained: str, tmp_path: Path
) -> None:
    carry = make_module(method, pretrained=pretrained)
    with torch.enable_grad():
        train(tmp_path, carry, 5, {"tbptt": 2})
    reset = make_module(method, pretrained=pretrained, fast_state="reset")
    reset.build({**FEATURES, "vocab_size": 300})
    reset.load_state_dict(carry.state_dict())
    total = count = 0.0
    for (chunk,) in make_data_of(tmp_path).val_dataloader():
        logits = reset.model(chunk["input_ids"], mask=chunk["mask"]).logits
        total += F.cross_entropy(logits.flatten(0, 1), chunk["labels"].flatten(), reduction="sum")
        count += (chunk["labels"] >= 0).sum()
    assert validate(tmp_path, reset) == pytest.approx((total / count).item(), rel=1e-5)
    # Far more than float32 rounds: what was read before matters.
    assert abs(validate(tmp_path, carry) - validate(tmp_path, reset)) > 1e-4


def make_data_of(folder: Path) -> Any:
    data = make_data(folder)
    data.prepare_data()
    data.setup("validate")
    return data


@pytest.mark.quick("ttt_lora+lora")
@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_holds_the_adapters_alone_and_goes_into_its_base_only(
    method: str, pretrained: str, tmp_path: Path
) -> None:
    path, module = tmp_path / "saved.ckpt", make_module(method, pretrained=pretrained)
    train(tmp_path, module, 2, trace=Trace(2, path))
    stored = torch.load(path, weights_only=True)["state_dict"]
    own = {name for name, p in module.named_parameters() if p.requires_grad}
    assert set(stored) == own, "base weights or fast state in the checkpoint"
    moved = str(shutil.copytree(pretrained, tmp_path / "moved"))
    again = make_module(method, seed=3, pretrained=moved)
    train(tmp_path, again, 2, checkpoint=path)
    assert_same_weights(again, module)

    base = AutoModelForCausalLM.from_pretrained(pretrained)
    torch.nn.init.normal_(base.model.layers[1].mlp.gate_proj.weight)
    base.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="other pretrained weights"):
        train(tmp_path, make_module(method, pretrained=str(tmp_path / "other")), 3, checkpoint=path)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("lora", {}, "trained with method=ttt_lora, .* says method=lora"),
        ("ttt_lora", {"mini_batch_size": 4}, "trained with ttt_lora=.*'mini_batch_size': 5"),
        ("ttt_lora", {"chunk_size": 3}, None),
    ],
    ids=["method", "learner", "options of another method"],
)
def test_resuming_with_other_options_names_them_if_the_method_has_them(
    method: str, changes: dict[str, Any], message: str | None, pretrained: str, tmp_path: Path
) -> None:
    path = tmp_path / "saved.ckpt"
    train(tmp_path, make_module(pretrained=pretrained), 1, trace=Trace(1, path))
    other = make_module(method, pretrained=pretrained, **changes)
    if message is None:
        assert list(train(tmp_path, other, 2, checkpoint=path).losses) == [2]
        return
    with pytest.raises(ValueError, match=message):
        train(tmp_path, other, 2, checkpoint=path)


@pytest.mark.parametrize(
    ("method", "size", "name"),
    [("ttt_lora", "mini_batch_size", "ttt_lora.learner.mini_batch_size"),
     ("ttt_lora+lora", "mini_batch_size", "ttt_lora.learner.mini_batch_size"),
     ("in_place", "chunk_size", "in_place.layer.chunk_size")],
)  # fmt: skip
def test_steps_in_which_nothing_written_is_read_are_an_error(
    method: str, size: str, name: str, recwarn: pytest.WarningsRecorder
) -> None:
    def check(value: int, **features: Any) -> None:
        make_module(method, **{size: value}).check({**FEATURES, **features})

    message = rf"reads 16 tokens of a file .*{name}=16.*raise the DataModule's chunk_length"
    with pytest.raises(ValueError, match=message):
        check(16)
    with pytest.raises(ValueError, match=f"{name}=40"):
        check(40, tbptt=2)
    with pytest.raises(ValueError, match=f"{name}=16"):  # packed rows carry nothing
        check(16, tbptt=2, mode="packed")
    with pytest.raises(ValueError, match=f"{name}=16"):
        reset = make_module(method, fast_state="reset", **{size: 16})
        reset.check({**FEATURES, "tbptt": 2})
    with pytest.warns(UserWarning, match=f"less than twice {name}=9"):
        check(9)
    recwarn.clear()
    check(8)
    check(16, tbptt=2)
    assert not recwarn.list
    make_module("lora", **{size: 400}).check(FEATURES)


def test_mode_b_reads_its_own_mini_batch() -> None:
    module = make_module(mini_batch_size=64)
    placement = module.ttt_lora
    module.ttt_lora = replace(placement, learner=replace(placement.learner, mode="B"))
    module.check(FEATURES)


def test_wrong_combinations_name_the_fix() -> None:
    with pytest.raises(ValueError, match="either config .* or pretrained"):
        TTTLoRAModule(adamw)
    with pytest.raises(ValueError, match="config needs model_type"):
        TTTLoRAModule(adamw, config={"hidden_size": 16})
    with pytest.raises(ValueError, match="unknown method 'tttlora'; choose none, lora"):
        TTTLoRAModule(adamw, method="tttlora", config=LLAMA)
    with pytest.raises(ValueError, match="unknown parameter group 'adapter'.*theta"):
        make_module(groups={"adapter": ParameterGroup()})


@torch.no_grad()
@pytest.mark.parametrize("method", ["ttt_lora", "in_place", "ttt_lora+lora"])
def test_generation_carries_what_was_learned_token_by_token(method: str) -> None:
    module = make_module(method)
    module.build(FEATURES)
    module.double().eval()
    torch.manual_seed(2)
    for name, parameter in module.named_parameters():
        if module.parameter_group(name) != "base":
            parameter.add_(0.3 * torch.randn_like(parameter))
    prompt = torch.arange(2 * 11).view(2, 11) * 7 % 250
    out = module.generate(prompt, max_new_tokens=9, do_sample=False, eos_token_id=None)
    expected = prompt
    for _ in range(9):  # longer than an In-Place chunk of 7, so that the state matters
        following = module.model(expected, use_cache=False).logits[:, -1].argmax(-1)
        expected = torch.cat([expected, following[:, None]], dim=1)
    assert out.shape[1] > 2 * IN_PLACE_CHUNK and torch.equal(out, expected)
