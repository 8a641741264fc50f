"""Trained adapters as files: back into their base bit for bit, also by peft, into no other."""

import json
from pathlib import Path

import pytest
import torch
from architecture_cases import build_model, tokens
from lact_module_cases import make_data, make_trainer, save_pretrained
from memory_cases import logits
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from ttt_lora_module_cases import METHODS, make_module, train

import lightning_modules.adapters.ttt_lora
from lightning_modules.layers.in_place_mlp import InPlaceConfig
from lightning_modules.models.adapter_files import load_adapters, save_adapters
from lightning_modules.models.in_place import InPlaceOptions
from lightning_modules.models.projection_lora import ProjectionLoRA
from lightning_modules.models.ttt_lora import TTTLoRAPlacement, inject_method, parameter_group
from lightning_modules.streams import FastState
from lightning_modules.ttt_lora import TTTLoRAModule

PLACEMENT = TTTLoRAPlacement(inner_dim=3)
IN_PLACE = InPlaceOptions(every_n=2, layer=InPlaceConfig(chunk_size=4, symmetric=True))


def adapted(method: str, architecture: str = "llama") -> PreTrainedModel:
    """A float64 model whose adapters do something, eval mode."""
    model = build_model(architecture).double()
    inject_method(model, method, PLACEMENT, IN_PLACE, ProjectionLoRA(rank=2))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter_group(name) != "base":
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += 0.2 * noise
    return model.eval()


def assert_does_the_same(model: nn.Module, expected: nn.Module) -> None:
    """Bit for bit, in one call and in two with the state between."""
    ids = tokens(2, 13)
    assert torch.equal(logits(model, ids), logits(expected, ids))
    assert torch.equal(in_two(model, ids), in_two(expected, ids))


@torch.no_grad()
def in_two(model: nn.Module, ids: Tensor) -> Tensor:
    """Scores of the second part, which reads with what the first one left."""
    first = FastState()
    model(ids[:, :6], use_cache=False, fast_state=first)
    return model(ids[:, 6:], use_cache=False, fast_state=first.advance()).logits


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_does_what_was_saved(method: str, tmp_path: Path) -> None:
    model = adapted(method)
    save_adapters(model, tmp_path / "saved")
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    files = [p for p in (tmp_path / "saved").rglob("*.safetensors")]
    stored = {name for path in files for name in load_file(path)}
    assert stored and all(parameter_group(name) != "base" for name in stored)
    own = [n for n, _ in model.named_parameters() if parameter_group(n) != "base"]
    assert len(stored) == len(own)
    again = build_model("llama").double()
    assert not torch.equal(logits(again, tokens(2, 13)), logits(model, tokens(2, 13)))
    kinds = load_adapters(again, tmp_path / "saved")
    assert kinds == sorted(method.split("+"), reverse=True)
    assert_does_the_same(again.eval(), model)
    with pytest.raises(ValueError, match=f"has {kinds[0]}.* already: load into a fresh base"):
        load_adapters(again, tmp_path / "saved")


def test_what_was_loaded_can_be_saved_again(tmp_path: Path) -> None:
    save_adapters(adapted("ttt_lora+lora"), tmp_path / "one")
    model = build_model("llama").double()
    load_adapters(model, tmp_path / "one")
    save_adapters(model, tmp_path / "two")
    for path in (tmp_path / "one").rglob("*.safetensors"):
        other = load_file(tmp_path / "two" / path.relative_to(tmp_path / "one"))
        assert all(torch.equal(value, other[n]) for n, value in load_file(path).items())


@pytest.mark.parametrize(
    ("method", "part"), [("ttt_lora", "ttt_lora"), ("lora", "lora"), ("ttt_lora+lora", "ttt_lora")]
)
def test_peft_itself_reads_the_files(method: str, part: str, tmp_path: Path) -> None:
    assert lightning_modules.adapters.ttt_lora.TTTLoraConfig is not None  # peft knows the method
    model = adapted(method)
    save_adapters(model, tmp_path / "saved")
    base = build_model("llama").double()
    by_peft = PeftModel.from_pretrained(base, tmp_path / "saved" / part).eval()
    if method == "ttt_lora+lora":  # TTT-LoRA alone: without LoRA's part
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()
    ids = tokens(2, 13)
    assert torch.equal(logits(by_peft, ids), logits(model, ids))


@pytest.mark.quick("in_place", "ttt_lora+lora")
@pytest.mark.parametrize("method", METHODS)
def test_a_trained_module_saves_what_a_fresh_base_reads(method: str, tmp_path: Path) -> None:
    name = save_pretrained(tmp_path)
    module = make_module(method, pretrained=name)
    with pytest.raises(ValueError, match="no model to save yet"):
        module.save_adapters(tmp_path / "saved")
    train(tmp_path, module, 3, {"tbptt": 2})
    module.save_adapters(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("model*"))
    again = AutoModelForCausalLM.from_pretrained(name)
    load_adapters(again, tmp_path / "saved")
    assert_does_the_same(again.eval(), module.model.eval())


def test_a_checkpoint_becomes_adapter_files(tmp_path: Path) -> None:
    name, path = save_pretrained(tmp_path), tmp_path / "saved.ckpt"
    module, trainer = make_module(pretrained=name), make_trainer(tmp_path, 2)
    trainer.fit(module, make_data(tmp_path))
    trainer.save_checkpoint(path)
    options = ("optimizer_factory", "method", "pretrained", "ttt_lora")
    given = dict(
        zip(("optimizer", *options[1:]), (getattr(module, n) for n in options), strict=True)
    )
    again = TTTLoRAModule.load_from_checkpoint(path, **given)
    again.save_adapters(tmp_path / "saved")
    base = AutoModelForCausalLM.from_pretrained(name)
    load_adapters(base, tmp_path / "saved")
    assert_does_the_same(base.eval(), module.model.eval())


@pytest.mark.parametrize("method", ["ttt_lora+lora", "in_place"])
def test_a_model_from_scratch_is_saved_whole(method: str, tmp_path: Path) -> None:
    module = make_module(method)
    train(tmp_path, module, 2)
    module.save_adapters(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    load_adapters(again, tmp_path / "saved")
    assert_does_the_same(again.eval(), module.model.eval())


@pytest.mark.parametrize("method", METHODS)
def test_adapters_do_not_go_into_other_weights(method: str, tmp_path: Path) -> None:
    save_adapters(adapted(method), tmp_path / "saved")
    other = build_model("llama", seed=5).double()
    before = [name for name, _ in other.named_parameters()]
    with pytest.raises(ValueError, match="trained in other weights"):
        load_adapters(other, tmp_path / "saved")
    assert [name for name, _ in other.named_parameters()] == before
    with pytest.raises(ValueError, match="trained in other weights"):
        load_adapters(build_model("qwen3").double(), tmp_path / "saved")


@pytest.mark.parametrize(
    ("method", "weights"),
    [("ttt_lora", "ttt_lora/adapter_model"), ("lora", "lora/adapter_model"),
     ("in_place", "in_place/in_place")],
)  # fmt: skip
def test_files_that_lack_a_tensor_are_refused(method: str, weights: str, tmp_path: Path) -> None:
    save_adapters(adapted(method), tmp_path / "saved")
    path = tmp_path / "saved" / f"{weights}.safetensors"
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[1])
    save_file(tensors, path)
    with pytest.raises(ValueError, match="does not have the tensors"):
        load_adapters(build_model("llama").double(), tmp_path / "saved")


def test_nothing_is_overwritten_and_nothing_left_half(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty: save the adapters into a new"):
        save_adapters(adapted("in_place"), tmp_path / "full")
    with pytest.raises(FileNotFoundError, match="holds no adapters.json"):
        load_adapters(build_model("llama"), tmp_path / "full")
    with pytest.raises(ValueError, match="has no adapters to save"):
        save_adapters(build_model("llama"), tmp_path / "none")

    def broken(*arguments: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("lightning_modules.models.adapter_files.base_fingerprint", broken)
    with pytest.raises(OSError, match="no space left"):
        save_adapters(adapted("ttt_lora"), tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


def test_adapters_of_another_name_are_left_to_peft(tmp_path: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = build_model("llama")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model, adapter_name="mine")
    with pytest.raises(ValueError, match="named mine, .*save them with peft"):
        save_adapters(model, tmp_path / "saved")


def test_options_of_in_place_are_plain_json(tmp_path: Path) -> None:
    save_adapters(adapted("in_place"), tmp_path / "saved")
    stored = json.loads((tmp_path / "saved" / "in_place" / "in_place.json").read_text())
    assert stored["every_n"] == 2 and stored["layer"]["symmetric"] is True
    contents = json.loads((tmp_path / "saved" / "adapters.json").read_text())
    assert contents["adapters"] == ["in_place"] and len(contents["base"]) == 16
