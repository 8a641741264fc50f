"""A trained memory as files: back into its base bit for bit, quantised, into no other model."""

import json
from pathlib import Path

import pytest
import torch
from architecture_cases import build_model, tokens
from memory_cases import add_memory, logits, memory_model, memory_options
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lightning_modules.adapters.fingerprint import fingerprint
from lightning_modules.layers.memory_bank import QuantizedBank
from lightning_modules.models.memory import inject_memory, memory_layers, remove_memory
from lightning_modules.models.memory_files import (
    export_banks,
    load_memory,
    quantize_memory,
    save_memory,
)
from lightning_modules.models.projection_lora import ProjectionLoRA, inject_lora

BANKS = {
    "standard": {},
    "factorized": {"kind": "factorized", "rank": 3},
    "reduced": {"kind": "reduced", "rank": 8},
}


@pytest.mark.parametrize("kind", BANKS)
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_saved_and_loaded_equals_what_was_saved(
    kind: str, bits: int | None, tmp_path: Path
) -> None:
    model, ids = memory_model(bank=BANKS[kind], sharing="per_layer"), tokens(2, 9)
    if bits is not None:
        quantize_memory(model, bits)
    expected = logits(model, ids)
    save_memory(model, tmp_path / "saved")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved"]
    names = load_file(tmp_path / "saved" / "memory.safetensors")
    assert names and not any("self_attn" in name or ".mlp." in name for name in names)
    again = build_model("llama").double()
    load_memory(again, tmp_path / "saved")
    assert torch.equal(logits(again, ids), expected)


def test_lora_is_saved_as_peft_reads_it(tmp_path: Path) -> None:
    model, ids = build_model("llama").double(), tokens(2, 9)
    inject_lora(model, ProjectionLoRA(rank=2))
    inject_memory(model, memory_options())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    expected = logits(model, ids)  # of LoRA alone: the memory is zero
    save_memory(model, tmp_path / "saved")
    base = build_model("llama").double()
    assert not torch.equal(logits(base, ids), expected)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(base, tmp_path / "saved"), ids), expected
    )
    again = build_model("llama").double()
    load_memory(again, tmp_path / "saved")
    assert torch.equal(logits(again, ids), expected)


@pytest.mark.parametrize("lora", [False, True])
def test_a_model_from_scratch_is_saved_whole(lora: bool, tmp_path: Path) -> None:
    model, ids = build_model("qwen3").double(), tokens(2, 9)  # with tied embeddings
    if lora:
        inject_lora(model, ProjectionLoRA(rank=2))
    add_memory(model, memory_options())
    expected = logits(model, ids)
    save_memory(model, tmp_path / "saved", with_base=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    assert not torch.equal(logits(again, ids), expected)
    load_memory(again, tmp_path / "saved")
    assert torch.equal(logits(again, ids), expected)


def test_a_memory_does_not_go_into_other_weights(tmp_path: Path) -> None:
    save_memory(memory_model(), tmp_path / "saved")
    other = build_model("llama", seed=5).double()
    with pytest.raises(ValueError, match="trained in other weights"):
        load_memory(other, tmp_path / "saved")
    assert not memory_layers(other)
    with pytest.raises(ValueError, match="trained in other weights"):
        load_memory(build_model("qwen3").double(), tmp_path / "saved")


def test_a_memory_that_names_its_base_in_the_older_way_is_read(tmp_path: Path) -> None:
    save_memory(memory_model(), tmp_path / "saved")
    file, base = tmp_path / "saved" / "memory.json", build_model("llama").double()
    stored = json.loads(file.read_text())
    older = fingerprint(base.named_parameters())
    assert stored["base"] not in (older, None)
    file.write_text(json.dumps({**stored, "base": older}))
    load_memory(base, tmp_path / "saved")
    assert torch.equal(logits(base, tokens(2, 9)), logits(memory_model(), tokens(2, 9)))


def test_a_bank_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_memory(memory_model(), tmp_path / "saved")
    path = tmp_path / "saved" / "memory.json"
    stored = json.loads(path.read_text())
    stored["options"]["memory"]["bank"]["num_rows"] = 30
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="does not have the tensors"):
        load_memory(build_model("llama").double(), tmp_path / "saved")


def test_nothing_is_overwritten_and_nothing_left_half(tmp_path: Path, monkeypatch) -> None:
    model = memory_model()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        save_memory(model, tmp_path / "full")
    with pytest.raises(FileNotFoundError, match="holds no memory.json"):
        load_memory(build_model("llama"), tmp_path / "full")

    def broken(*arguments: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("lightning_modules.models.memory_files._description", broken)
    with pytest.raises(OSError, match="no space left"):
        save_memory(model, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_memory_is_close_and_cannot_be_quantised_again(bits: int) -> None:
    model, ids = memory_model(sharing="shared"), tokens(2, 9)
    expected, rows = logits(model, ids), model.memory_banks[0].rows().detach()
    quantize_memory(model, bits)
    bank = model.memory_banks[0]
    assert isinstance(bank, QuantizedBank) and not list(bank.parameters())
    assert all(layer.memory.reader.bank is bank for _, layer in memory_layers(model))
    error = (bank.read(torch.arange(len(rows))) - rows).abs()
    limit = rows.abs().amax(1, keepdim=True) / (127 if bits == 8 else 7) / 2
    assert (error <= limit * (1 + 1e-9)).all() and error.max() > 0
    assert 0 < (logits(model, ids) - expected).abs().max() < (0.1 if bits == 8 else 3.0)
    with pytest.raises(ValueError, match="not quantised already"):
        quantize_memory(model, bits)


def test_rows_are_exported(tmp_path: Path) -> None:
    model = memory_model(bank=BANKS["factorized"], sharing="per_layer")
    export_banks(model, tmp_path / "rows.safetensors")
    rows = load_file(tmp_path / "rows.safetensors")
    assert sorted(rows) == ["bank_0", "bank_1"]
    assert torch.equal(rows["bank_1"], model.memory_banks[1].rows())
    quantize_memory(model, 8)
    export_banks(model, tmp_path / "codes.safetensors")
    assert "bank_0.codes" in load_file(tmp_path / "codes.safetensors")
    remove_memory(model)
    with pytest.raises(ValueError, match="no bank to export"):
        export_banks(model, tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="has no memory"):
        save_memory(model, tmp_path / "none")
