"""LaCT beside the attention of a pretrained model: checkpoints of the branches alone."""

import shutil
from pathlib import Path

import pytest
import torch
from lact_module_cases import CHUNK, adamw, make_data, make_trainer, save_pretrained
from transformers import AutoModelForCausalLM

from lightning_modules.adapters import AdapterSpec
from lightning_modules.lact import LaCTModule
from lightning_modules.models.pretrained import PretrainedOptions


def make_module(name: str, chunk: int = 4, train: str = "adapters") -> LaCTModule:
    torch.manual_seed(0)
    options = {
        "memory": {"num_lact_heads": 2},
        "update": {"lact_chunk_size": chunk},
        "alpha_init": 0.0,
    }
    return LaCTModule(
        adamw,
        pretrained=PretrainedOptions(name, train=train),
        adapters=[AdapterSpec("*", "lact", options)],
    )


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return save_pretrained(tmp_path)


@torch.no_grad()
def test_closed_gates_validate_as_the_pretrained_model_reads_each_chunk(
    folder: str, tmp_path: Path
) -> None:
    data, module = make_data(tmp_path), make_module(folder)
    trainer = make_trainer(tmp_path, 1, limit_val_batches=1.0)
    logged = trainer.validate(module, data, verbose=False)[0]
    base, total, count = AutoModelForCausalLM.from_pretrained(folder), 0.0, 0
    for batch in data.val_dataloader():
        for chunk in batch:
            logits = base(chunk["input_ids"]).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), chunk["labels"].flatten(), reduction="sum"
            )
            total, count = total + loss.item(), count + (chunk["labels"] >= 0).sum().item()
    assert logged["val/loss"] == pytest.approx(total / count, rel=1e-5)


def test_a_checkpoint_goes_on_where_the_model_has_moved_and_refuses_another(
    folder: str, tmp_path: Path
) -> None:
    trainer, module = make_trainer(tmp_path, 2), make_module(folder)
    trainer.fit(module, make_data(tmp_path))
    path = tmp_path / "saved.ckpt"
    trainer.save_checkpoint(path)
    stored = torch.load(path, weights_only=True)["state_dict"]
    assert stored and all(".lact" in name for name in stored)
    moved = shutil.copytree(folder, tmp_path / "moved")
    again = make_module(str(moved))
    make_trainer(tmp_path, 3).fit(again, make_data(tmp_path), ckpt_path=path)
    frozen = {n: p for n, p in again.model.named_parameters() if not p.requires_grad}
    before = dict(module.model.named_parameters())
    assert frozen and all(torch.equal(p, before[n]) for n, p in frozen.items())

    other = AutoModelForCausalLM.from_pretrained(folder)
    torch.nn.init.normal_(other.model.layers[0].mlp.up_proj.weight)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="other pretrained weights"):
        make_trainer(tmp_path, 3).fit(
            make_module(str(tmp_path / "other")), make_data(tmp_path), ckpt_path=path
        )


def test_training_all_saves_all(folder: str, tmp_path: Path) -> None:
    trainer, module = make_trainer(tmp_path, 1), make_module(folder, train="all")
    trainer.fit(module, make_data(tmp_path))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    stored = torch.load(tmp_path / "saved.ckpt", weights_only=True)["state_dict"]
    assert any("embed_tokens" in name for name in stored)
    assert {module.parameter_group(f"model.{n}") for n, _ in module.model.named_parameters()} == {
        "base",
        "adapter",
        "gate",
        "fast",
    }


def test_branches_that_could_never_learn_to_write_are_an_error(folder: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapters\[0\] update.lact_chunk_size=16"):
        make_trainer(tmp_path, 1).fit(make_module(folder, chunk=CHUNK), make_data(tmp_path))


def test_a_tokenizer_that_is_not_the_models_is_an_error(folder: str) -> None:
    features = {"vocab_size": 5000, "chunk_length": CHUNK, "tbptt": 1, "mode": "stream"}
    with pytest.raises(ValueError, match="token ids up to 4999"):
        make_module(folder).build(features)


def test_a_model_that_is_not_there_is_an_error() -> None:
    features = {"vocab_size": 50, "chunk_length": CHUNK, "tbptt": 1, "mode": "stream"}
    with pytest.raises(ValueError, match="pretrained.name='no/where' cannot be loaded"):
        make_module("no/where").build(features)
