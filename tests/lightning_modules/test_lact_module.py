"""LaCTModule: its loss against one pass, exact resuming, options and data that must agree."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lact_module_cases import CHUNK, CONFIG, Trace, adamw, make_data, make_module, make_trainer
from torch import Tensor
from torch.nn import functional as F

from datamodules import RecallDataModule
from datamodules.recall_probes import RecallProbe
from lightning_modules.lact import LaCTModule
from lightning_modules.models.lact import LaCTForCausalLM
from lightning_modules.streams import FastState

FEATURES = {"vocab_size": 259, "chunk_length": CHUNK, "tbptt": 1, "mode": "stream"}


def built(config: dict[str, Any] | None = None, **options: Any) -> LaCTModule:
    module = make_module(config, **options)
    module.build(FEATURES)
    return module.double().eval()


def whole_files(data: Any) -> list[Tensor]:
    """Tokens of the validation documents."""
    _, validation = data._split
    return [torch.from_numpy(data.store.document(n).astype("int64")) for n in validation]


@torch.no_grad()
def test_validation_loss_equals_one_pass_over_every_file(tmp_path: Path) -> None:
    data, module = make_data(tmp_path), make_module()
    trainer = make_trainer(tmp_path, 1, limit_val_batches=1.0)
    logged = trainer.validate(module, data, verbose=False)[0]
    losses, hits = [], []
    for tokens in whole_files(data):
        logits = module.model(tokens[None, :-1]).logits[0]
        losses.append(F.cross_entropy(logits, tokens[1:], reduction="none"))
        hits.append((logits.argmax(-1) == tokens[1:]).float())
    assert len(losses) >= 3
    assert logged["val/loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert logged["val/accuracy"] == pytest.approx(torch.cat(hits).mean().item(), abs=1e-6)


def test_reset_every_chunk_is_another_loss(tmp_path: Path) -> None:
    results = []
    for fast_state in ("carry", "reset"):
        trainer = make_trainer(tmp_path, 1, limit_val_batches=1.0)
        module = make_module(fast_state=fast_state)
        results.append(trainer.validate(module, make_data(tmp_path), verbose=False)[0])
    assert abs(results[0]["val/loss"] - results[1]["val/loss"]) > 1e-3


def test_packed_loss_equals_the_documents_alone(tmp_path: Path) -> None:
    data = make_data(tmp_path, mode="packed", chunk_length=64)
    trainer = make_trainer(tmp_path, 1, limit_val_batches=1.0)
    module = make_module()
    logged = trainer.validate(module, data, verbose=False)[0]
    total = count = 0.0
    for batch in data.val_dataloader():
        for chunk in batch:
            total_, count_ = documents_alone(module, chunk)
            total, count = total + total_, count + count_
    assert logged["val/loss"] == pytest.approx(total / count, rel=1e-5)


@torch.no_grad()
def documents_alone(module: LaCTModule, chunk: dict[str, Tensor]) -> tuple[float, float]:
    """Sum and number of the losses of a packed chunk, each document read by itself."""
    total = count = 0.0
    for row, mask in enumerate(chunk["mask"]):
        ids = chunk["document_ids"][row]
        for document in ids[mask].unique():
            here = mask & (ids == document)
            logits = module.model(chunk["input_ids"][row, here][None]).logits[0]
            labels = chunk["labels"][row, here]
            total += F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100).item()
            count += (labels >= 0).sum().item()
    return total, count


@pytest.mark.quick("0-5")
@pytest.mark.parametrize("save_after", [2, 5])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_resumed_in_the_middle_of_files_equals_never_stopped(
    tmp_path: Path, save_after: int, workers: int
) -> None:
    path = tmp_path / "saved.ckpt"
    whole = Trace(save_after, path)
    make_trainer(tmp_path, 8, whole).fit(
        make_module(), make_data(tmp_path, tbptt=2, num_workers=workers)
    )
    resumed = Trace()
    make_trainer(tmp_path, 8, resumed).fit(
        make_module(), make_data(tmp_path, tbptt=2, num_workers=workers), ckpt_path=path
    )
    assert list(resumed.losses) == list(range(save_after + 1, 9))
    assert all(resumed.losses[step] == whole.losses[step] for step in resumed.losses)


@pytest.mark.parametrize(
    ("changes", "data", "message"),
    [
        ({"lact_chunk_size": 4}, {}, "lact_chunk_size"),
        ({"r": 1, "residual_ttt": False}, {}, "r.: 1"),
        ({}, {"batch_size": 3}, "resume with data.init_args.batch_size=2"),
    ],
    ids=["chunk size", "r", "batch size"],
)
def test_resuming_with_other_options_names_them(
    tmp_path: Path, changes: dict[str, Any], data: dict[str, Any], message: str
) -> None:
    path = tmp_path / "saved.ckpt"
    make_trainer(tmp_path, 4, Trace(2, path)).fit(make_module(), make_data(tmp_path))
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, 4).fit(
            make_module(changes), make_data(tmp_path, **data), ckpt_path=path
        )


def test_every_parameter_learns_and_has_its_group(tmp_path: Path) -> None:
    module = make_module({"use_momentum": True, "qkv_bias": True})
    make_trainer(tmp_path, 1).fit(module, make_data(tmp_path, chunk_length=48))
    still = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.abs().max()]
    # Momentum matters from the second update on: 48 tokens are six chunks of 8.
    assert not still
    groups = {name: module.parameter_group(name) for name, _ in module.named_parameters()}
    fast = {name for name, group in groups.items() if group == "fast"}
    kinds = {name.split("attn.")[1].split(".")[0] for name in fast}
    assert kinds == {"stacked_mlps", "lr_proj", "momentum_proj"}
    assert {"base", "fast"} == set(groups.values())
    plain = [n for n, p in module.named_parameters() if not module.decays(n, p)]
    assert {n.split(".")[-1] for n in plain if "qk_" in n} == {"qk_scale", "qk_offset"}


def test_a_step_that_could_never_learn_to_write_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reads 16 tokens .*lact_chunk_size=16"):
        make_trainer(tmp_path, 1).fit(make_module({"lact_chunk_size": 16}), make_data(tmp_path))
    module = make_module({"lact_chunk_size": 16, "window_size": 16})
    with pytest.warns(UserWarning, match="momentum never learns: better read more than 32"):
        make_trainer(tmp_path, 1).fit(module, make_data(tmp_path, tbptt=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": None}, "either config"),
        ({"config": {**CONFIG, "hiden_size": 8}}, "did you mean 'hidden_size'"),
        ({"config": {**CONFIG, "num_attn_heads": 3}}, "16 is not divisible by num_attn_heads=3"),
        ({"config": CONFIG, "adapters": [{"pattern": "*", "adapter_type": "lact"}]}, "pretrained"),
    ],
)
def test_wrong_options_name_the_fix(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LaCTModule(adamw, **options)


def test_official_three_billion_file_says_that_25_heads_do_not_divide() -> None:
    with pytest.raises(ValueError, match="3072 is not divisible by num_attn_heads=25"):
        LaCTModule(adamw, config={"hidden_size": 3072, "num_attn_heads": 25, "num_lact_heads": 4})


@torch.no_grad()
def test_generation_equals_greedy_reading_from_the_start() -> None:
    module = built()
    prompt = torch.arange(2 * 11).view(2, 11) * 7 % 250
    out = module.generate(prompt, max_new_tokens=9, do_sample=False, eos_token_id=None)
    expected = prompt
    for _ in range(9):
        following = module.model(expected, use_cache=False).logits[:, -1].argmax(-1)
        expected = torch.cat([expected, following[:, None]], dim=1)
    assert torch.equal(out, expected)


@torch.no_grad()
def test_loss_without_labels_is_zero_and_finite() -> None:
    module = built()
    ids = torch.zeros(2, CHUNK, dtype=torch.int64)
    chunk = {"input_ids": ids, "labels": ids - 100, "mask": ids.bool()}
    assert module.chunk_loss(chunk, FastState.transient(), None) == 0


def test_masks_that_mask_nothing_do_not_reach_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, seen = make_module(), []
    forward = LaCTForCausalLM.forward

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs.get("mask"))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LaCTForCausalLM, "forward", spy)
    trainer = make_trainer(tmp_path, 1, limit_val_batches=1.0)
    trainer.validate(module, make_data(tmp_path), verbose=False)
    assert any(mask is None for mask in seen)
    assert any(mask is not None for mask in seen)
    assert all(mask is None or not mask.all() for mask in seen)


def test_recall_data_trains(tmp_path: Path) -> None:
    probe = RecallProbe(vocab_size=40, sequence_length=48, min_distance=24, num_pairs=4,
                        num_queries=4)  # fmt: skip
    data = RecallDataModule(probe, train_sequences=8, val_sequences=4, batch_size=2)
    trainer = make_trainer(tmp_path, 3, limit_val_batches=1.0)
    module = make_module()
    trainer.fit(module, data)
    logged = trainer.validate(module, data, verbose=False)[0]
    assert abs(logged["val/loss"] - math.log(40)) < 2


def test_predictions_are_losses_by_chunk(tmp_path: Path) -> None:
    data, module = make_data(tmp_path), make_module()
    parts = make_trainer(tmp_path, 1).predict(module, data)
    loss, labels = (torch.cat([part[name] for part in parts]) for name in ("loss", "labels"))
    files = whole_files(data)
    assert labels.sum() == sum(len(tokens) - 1 for tokens in files)
    trainer = make_trainer(tmp_path, 1, limit_val_batches=1.0)
    logged = trainer.validate(module, data, verbose=False)[0]
    assert logged["val/loss"] == pytest.approx(((loss * labels).sum() / labels.sum()).item(), 1e-5)
