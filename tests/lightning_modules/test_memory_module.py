"""MemoryBankModule: arms, groups, checkpoints, exact resuming, data that must fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lact_module_cases import LLAMA, Trace, adamw, make_data, make_trainer, save_pretrained
from memory_cases import BLOCK, memory_options

from lightning_modules.base import ParameterGroup
from lightning_modules.memory_bank import MemoryBankModule
from lightning_modules.models.pretrained import PretrainedOptions
from lightning_modules.models.projection_lora import ProjectionLoRA

FEATURES = {"vocab_size": 259, "chunk_length": 16, "tbptt": 1, "mode": "packed"}


def make_module(strategy: str = "block", arm: str = "memory", **options: Any) -> MemoryBankModule:
    torch.manual_seed(0)
    memory = options.pop("memory", None) or memory_options(strategy)
    options = {"config": LLAMA, **options} if "pretrained" not in options else options
    return MemoryBankModule(adamw, arm=arm, memory=memory, **options)


def adapted(folder: Path, arm: str, **options: Any) -> MemoryBankModule:
    name = options.pop("name", None) or save_pretrained(folder)
    lora = ProjectionLoRA(rank=2)
    return make_module(arm=arm, pretrained=PretrainedOptions(name), lora=lora, **options)


@pytest.mark.parametrize(
    ("arm", "groups"),
    [
        ("memory", {"memory", "bank"}),
        ("lora", {"lora"}),
        ("both", {"memory", "bank", "lora"}),
    ],
)
def test_an_arm_trains_what_it_adds_and_starts_as_the_base(
    arm: str, groups: set[str], tmp_path: Path
) -> None:
    data = make_data(tmp_path, mode="packed")
    name = save_pretrained(tmp_path)
    vanilla = adapted(tmp_path, "vanilla", name=name)
    first, trainer = adapted(tmp_path, arm, name=name), make_trainer(tmp_path, 1)
    expected = make_trainer(tmp_path, 1, limit_val_batches=1.0).validate(
        vanilla, data, verbose=False
    )
    logged = make_trainer(tmp_path, 1, limit_val_batches=1.0).validate(first, data, verbose=False)
    assert logged[0]["val/loss"] == expected[0]["val/loss"]
    module = adapted(tmp_path, arm, name=name)
    trainer = make_trainer(tmp_path, 3)
    trainer.fit(module, data)
    trained = {g["name"].split("/")[0] for g in trainer.optimizers[0].param_groups}
    assert trained == groups
    base = {n: p for n, p in vanilla.model.named_parameters()}
    for parameter_name, parameter in module.model.named_parameters():
        plain = parameter_name.replace(".base_layer", "")
        if plain in base:
            assert torch.equal(parameter, base[plain]) and not parameter.requires_grad
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    stored = torch.load(tmp_path / "saved.ckpt", weights_only=True)["state_dict"]
    assert {module.parameter_group(key) for key in stored} == groups


@pytest.mark.parametrize("recompute", [False, True])
def test_a_pretrained_model_trains_in_training_mode(recompute: bool, tmp_path: Path) -> None:
    name = save_pretrained(tmp_path)
    options = memory_options("block", router={"balance_coefficient": 0.1})
    pretrained = PretrainedOptions(name, gradient_checkpointing=recompute)
    module = make_module(pretrained=pretrained, memory=options)
    calls: list[bool] = []
    trainer = make_trainer(tmp_path, 1)
    module.build({**FEATURES, "vocab_size": 300})
    layer = module.model.model.layers[0]
    layer.input_layernorm.register_forward_hook(lambda *_: calls.append(True))
    trainer.fit(module, make_data(tmp_path, mode="packed"))
    # The loss of the router is there, and a layer that is recomputed runs twice.
    assert "train/router_balance" in trainer.callback_metrics
    assert len(calls) == (2 if recompute else 1)


def test_groups_have_their_rates_and_banks_no_decay(tmp_path: Path) -> None:
    groups = {"bank": ParameterGroup(lr_scale=3.0), "memory": ParameterGroup(lr_scale=0.5)}
    module, trainer = make_module(groups=groups), make_trainer(tmp_path, 1)
    trainer.fit(module, make_data(tmp_path, mode="packed"))
    found = {g["name"]: g for g in trainer.optimizers[0].param_groups}
    assert set(found) == {
        "base",
        "base/no_decay",
        "memory",
        "memory/no_decay",
        "bank/no_decay",
    }
    assert found["bank/no_decay"]["initial_lr"] == pytest.approx(3e-2)
    assert found["memory"]["initial_lr"] == pytest.approx(5e-3)
    assert found["base"]["initial_lr"] == pytest.approx(1e-2)
    assert found["bank/no_decay"]["weight_decay"] == 0 < found["base"]["weight_decay"]
    (bank,) = found["bank/no_decay"]["params"]
    assert bank is module.model.memory_banks[0].weight


@pytest.mark.quick("stream-rolling", "packed-block")
@pytest.mark.parametrize("strategy", ["block", "token", "rolling"])
@pytest.mark.parametrize("mode", ["stream", "packed"])
def test_resumed_equals_never_stopped(strategy: str, mode: str, tmp_path: Path) -> None:
    # A router that shifts decisions when it lost its place would change losses.
    def make() -> MemoryBankModule:
        options = memory_options(
            strategy, router={"balance_coefficient": 0.1, "z_coefficient": 0.1}
        )
        return make_module(memory=options)

    path = tmp_path / "at_3.ckpt"
    whole, rest = Trace(3, path), Trace()
    module = make()
    make_trainer(tmp_path, 6, whole).fit(module, make_data(tmp_path, mode=mode))
    again = make()
    trainer = make_trainer(tmp_path, 6, rest)
    trainer.fit(again, make_data(tmp_path, mode=mode), ckpt_path=path)
    assert rest.losses == {step: whole.losses[step] for step in (4, 5, 6)}
    for name, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_losses_of_the_router_are_logged_beside_that_of_the_model(tmp_path: Path) -> None:
    options = memory_options("block", router={"balance_coefficient": 0.1, "z_coefficient": 0.2})
    module, trainer = make_module(memory=options), make_trainer(tmp_path, 2)
    trainer.fit(module, make_data(tmp_path, mode="packed"))
    logged = trainer.callback_metrics
    assert {"train/loss", "train/router_balance", "train/router_z"} <= set(logged)
    assert logged["train/router_balance"] >= 0.1 * 0.99
    assert logged["train/loss"] < 7  # near ln 259, without them


def test_validation_of_non_causal_routing_also_reads_prefixes(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="only val/prefix_loss"):
        module = make_module("sequence")
    trainer = make_trainer(tmp_path, 1, limit_val_batches=2)
    logged = trainer.validate(module, make_data(tmp_path, mode="packed"), verbose=False)[0]
    # A new memory adds nothing, so that both are the same model on other places.
    assert abs(logged["val/prefix_loss"] - logged["val/loss"]) < 2
    causal = make_module("block")
    trainer = make_trainer(tmp_path, 1, limit_val_batches=2)
    logged = trainer.validate(causal, make_data(tmp_path, mode="packed"), verbose=False)[0]
    assert "val/prefix_loss" not in logged


def test_documents_begin_with_a_block_unless_the_data_says_otherwise(tmp_path: Path) -> None:
    for options, strategy, expected in (
        ({}, "block", BLOCK),
        ({"packing_alignment": 1}, "block", 1),
        ({}, "token", 1),
        ({"chunk_length": 18}, "block", 1),  # which blocks do not fill
    ):
        data = make_data(tmp_path, mode="packed", **options)
        make_trainer(tmp_path, 1).fit(make_module(strategy), data)
        assert data.alignment == expected
        (chunk,) = next(iter(data.train_dataloader()))
        assert chunk["document_alignment"] == expected


def test_wrong_combinations_name_the_fix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="either config .* or pretrained"):
        MemoryBankModule(adamw)
    with pytest.raises(ValueError, match="config needs model_type"):
        MemoryBankModule(adamw, config={"hidden_size": 16})
    with pytest.raises(ValueError, match="arm=both puts LoRA on a frozen model"):
        make_module(arm="both")
    with pytest.raises(ValueError, match="puts LoRA on a frozen model"):
        make_module(arm="lora", pretrained=PretrainedOptions("x", train="all"))
    with pytest.raises(ValueError, match="unknown parameter group 'adapter'"):
        make_module(groups={"adapter": ParameterGroup()})
    with pytest.raises(ValueError, match="no more than one block of the router"):
        make_module().check({**FEATURES, "chunk_length": BLOCK})
    make_module().check({**FEATURES, "chunk_length": BLOCK, "mode": "stream"})
    with pytest.raises(ValueError, match="use ChatDataModule"):
        make_module("prompt").check(FEATURES)


def test_resuming_with_another_router_names_it(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, 1)
    trainer.fit(make_module(), make_data(tmp_path, mode="packed"))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    other = make_module("token")
    with pytest.raises(ValueError, match="checkpoint was trained with memory="):
        data = make_data(tmp_path, mode="packed")
        make_trainer(tmp_path, 2).fit(other, data, ckpt_path=tmp_path / "saved.ckpt")


def test_generation_continues_token_by_token() -> None:
    module = make_module()
    module.build(FEATURES)
    prompt = torch.randint(0, 256, (2, 7))
    out = module.eval().generate(prompt, max_new_tokens=6, do_sample=False)
    expected = prompt
    for _ in range(6):
        with torch.no_grad():
            scores = module.model(expected, use_cache=False).logits[:, -1:]
        expected = torch.cat([expected, scores.argmax(-1)], dim=1)
    assert torch.equal(out, expected)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["block", "token"])
def test_a_compiled_model_trains_as_the_plain_one(strategy: str, tmp_path: Path) -> None:
    found = []
    for compiled in (False, True):
        trace = Trace()
        module = make_module(strategy, compile_model=compiled)
        make_trainer(tmp_path, 3, trace).fit(module, make_data(tmp_path, mode="packed"))
        found.append(list(trace.losses.values()))
    # float32 sums in another order, through three steps
    assert found[1] == pytest.approx(found[0], rel=1e-4)
