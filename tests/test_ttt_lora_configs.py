"""Configs of TTT-LoRA, In-Place TTT and LoRA: run, shortened; those of the hub built on meta."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from audio_cases import write_codes
from config_cases import CONFIGS, fit_validate_resume, run_folder
from lact_module_cases import save_pretrained
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_modules.adapters import as_config
from lightning_modules.layers.ttt_lora_size import match_lora_siblings, parameter_count
from lightning_modules.models.in_place import InPlaceOptions
from lightning_modules.models.projection_lora import ProjectionLoRA
from lightning_modules.models.ttt_lora import TTTLoRAPlacement, inject_method, parameter_group

TINY = CONFIGS / "tiny" / "text.yaml"
SCRATCH = ["ttt_lora_small", "ttt_lora_moshi_tiny"]
HUB = {
    "ttt_lora_smollm2": {"theta", "fast", "gate"},
    "lora_smollm2": {"lora"},
    "in_place_qwen3": {"in_place"},
}
"""Config -> the parameter groups that it trains."""


def test_every_config_is_in_a_table() -> None:
    patterns = ("ttt_lora*", "lora*", "in_place*")
    found = {path.stem for pattern in patterns for path in CONFIGS.glob(f"{pattern}.yaml")}
    assert found == {*SCRATCH, *HUB}


def options_of(name: str) -> list[str]:
    return ["--config", str(CONFIGS / f"{name}.yaml"), "--config", str(TINY)]


def groups_in(checkpoint: Path) -> set[str]:
    groups = torch.load(checkpoint, weights_only=True)["optimizer_states"][0]["param_groups"]
    return {group["name"].split("/")[0] for group in groups}


@pytest.mark.slow
def test_small_config_fits_validates_goes_on_and_writes_what_its_monitors_promise(
    run_cli, tmp_path: Path
) -> None:
    run = run_folder(tmp_path, "ttt_lora_small")
    options = [*options_of("ttt_lora_small"), *files(tmp_path), "--data.chunk_length", "64"]
    options += ["--model.init_args.config.num_hidden_layers", "2"]
    events = fit_validate_resume(run_cli, options, run)
    written = set(events.Tags()["scalars"])
    assert {"train/loss", "val/loss", "val/accuracy", "throughput/tokens_per_sec"} <= written
    missing = fast_weight_tags("llama", 2) - written
    assert not missing and "fast_weight/reset_share" in written
    assert any(tag.startswith("position_loss/from_") for tag in written)
    assert any(tag.startswith("chunk_loss/chunk_") for tag in written)
    assert "position_loss/curve" in events.Tags()["images"]
    assert groups_in(run / "checkpoints" / "last.ckpt") == {"base", "theta", "fast", "gate"}


@pytest.mark.slow
def test_moshi_learns_from_files_of_audio_codes(run_cli, tmp_path: Path) -> None:
    codes = write_codes(tmp_path, copies=4)
    run = run_folder(tmp_path, "ttt_lora_moshi_tiny")
    options = [*options_of("ttt_lora_moshi_tiny"), "--data.path", str(codes)]
    options += ["--data.chunk_frames", "12", "--model.init_args.config.num_hidden_layers", "2"]
    events = fit_validate_resume(run_cli, options, run)
    written = set(events.Tags()["scalars"])
    assert {"train/loss", "val/loss", "val/accuracy", "fast_weight/reset_share"} <= written
    assert not fast_weight_tags("moshi", 2) - written
    assert any(tag.startswith("position_loss/from_") for tag in written)
    assert groups_in(run / "checkpoints" / "last.ckpt") == {"base", "theta", "fast", "gate"}
    (codes / "zz.npy").write_bytes(b"")
    refused = run_cli("fit", *options)
    assert refused.code != 0 and "Traceback" not in refused.err
    assert "zz.npy cannot be read as codes" in refused.last_line


def fast_weight_tags(architecture: str, layers: int) -> set[str]:
    """What `FastWeightMonitor` writes of each group of siblings."""
    quantities = ("state_norm", "relative_change", "relative_change_max", "cosine", "eta",
                  "inner_loss_before", "inner_loss_after")  # fmt: skip
    mlp = {"llama": ("gate_proj+up_proj", "down_proj"), "moshi": ("fc1", "fc2")}[architecture]
    groups = ["self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj", *(f"mlp.{n}" for n in mlp)]
    return {
        f"fast_weight/{quantity}/layer_{n:02d}/{group}.ttt_lora"
        for quantity in quantities
        for n in range(layers)
        for group in groups
    }


def files(folder: Path) -> list[str]:
    """Options for a folder of eight texts of 2500 letters instead of the standard library."""
    texts = folder / "long_texts"
    texts.mkdir()
    for number in range(8):
        letters = (chr(97 + (place * place * (number + 1) // 7) % 26) for place in range(2500))
        (texts / f"{number}.txt").write_text("".join(letters))
    options = ["--data.source.kind", "files", "--data.source.path", str(texts)]
    return [*options, "--data.min_tokens", "2048"]


@pytest.fixture
def pretrained(tmp_path: Path) -> list[str]:
    """Options for a tiny Qwen3 instead of the model of the hub."""
    options = ["--model.init_args.pretrained.name", save_pretrained(tmp_path)]
    options += ["--data.tokenizer.kind", "bytes", "--data.tokenizer.name", "null"]
    options += [*files(tmp_path), "--data.chunk_length", "64"]
    return [*options, "--trainer.precision", "32-true"]


SMALLER = {
    "ttt_lora": ["--model.init_args.ttt_lora.inner_dim", "4"],
    "lora": ["--model.init_args.lora.rank", "2"],
    "in_place": [
        "--model.init_args.in_place.every_n=2",
        "--model.init_args.in_place.layer.chunk_size=16",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method", "groups"),
    [
        *((name, None, groups) for name, groups in HUB.items()),
        ("ttt_lora_smollm2", "in_place", {"in_place"}),
        ("ttt_lora_smollm2", "ttt_lora+lora", {"theta", "fast", "gate", "lora"}),
    ],
)
def test_config_of_a_pretrained_model_trains_its_adapters(
    name: str, method: str | None, groups: set[str], pretrained: list[str], run_cli, tmp_path: Path
) -> None:
    given = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]["init_args"]["method"]
    options = [*options_of(name), *pretrained]
    options += ["--model.init_args.method", method] if method else []
    for part in (method or given).split("+"):
        options += SMALLER[part]
    run = run_folder(tmp_path, name)
    events = fit_validate_resume(run_cli, options, run)
    written = set(events.Tags()["scalars"])
    assert any(tag.startswith("position_loss/from_") for tag in written)
    learns = bool({"theta", "in_place"} & groups)
    assert any(tag.startswith("fast_weight/state_norm/") for tag in written) == learns
    checkpoint = run / "checkpoints" / "last.ckpt"
    assert groups_in(checkpoint) == groups
    names = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert names and {parameter_group(name) for name in names} == groups


@pytest.mark.slow
def test_a_base_without_adapters_is_validated_and_refuses_to_train(
    pretrained: list[str], run_cli
) -> None:
    options = [*options_of("ttt_lora_smollm2"), *pretrained, "--model.init_args.method", "none"]
    assert run_cli("validate", *options).code == 0
    refused = run_cli("fit", *options)
    assert refused.code != 0 and "Traceback" not in refused.err
    assert "no parameter is left to train" in refused.last_line


def test_a_chunk_that_is_one_mini_batch_is_refused_in_one_line(run_cli) -> None:
    options = [*options_of("ttt_lora_small"), "--data.chunk_length", "8", "--data.tbptt", "2"]
    refused = run_cli("fit", *options)
    assert refused.code != 0 and "Traceback" not in refused.err
    assert "ttt_lora.learner.mini_batch_size=16" in refused.last_line


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-0.6B": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}
"""Of the models on the hub, as their cards say."""

BASE = {"HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008, "Qwen/Qwen3-0.6B": 596_049_920}
"""Their published numbers of parameters."""


def families(name: str) -> list[list[tuple[int, int]]]:
    """(in, out) of the linear maps of a layer, those together that read the same input."""
    sizes = ARCHITECTURES[name]
    hidden, mlp = sizes["hidden_size"], sizes["intermediate_size"]
    head = sizes.get("head_dim", hidden // sizes["num_attention_heads"])
    queries, keys = (sizes[f"num_{n}_heads"] * head for n in ("attention", "key_value"))
    attention = [[(hidden, queries), (hidden, keys), (hidden, keys)], [(queries, hidden)]]
    return [*attention, [(hidden, mlp), (hidden, mlp)], [(mlp, hidden)]]


def lora_parameters(name: str, rank: int = 16) -> int:
    """`r (in + out)` of every linear map."""
    layer = sum(i + o for family in families(name) for i, o in family)
    return rank * layer * ARCHITECTURES[name]["num_hidden_layers"]


def ttt_lora_parameters(name: str, rank: int = 16) -> int:
    """With the largest inner size of each family that a LoRA of this rank allows."""
    total = 0
    for family in families(name):
        size = match_lora_siblings(rank, family)
        total += sum(parameter_count(i, o, size) for i, o in family)
    return total * ARCHITECTURES[name]["num_hidden_layers"]


def in_place_parameters(name: str, every_n: int, kernel_size: int = 5) -> int:
    """A projection `D x D` and a depthwise convolution in every n-th layer."""
    sizes = ARCHITECTURES[name]
    hidden = sizes["hidden_size"]
    return sizes["num_hidden_layers"] // every_n * (hidden**2 + kernel_size * hidden)


@pytest.mark.parametrize(
    ("config", "method", "expected"),
    [
        ("ttt_lora_smollm2", "ttt_lora", ttt_lora_parameters),
        ("ttt_lora_smollm2", "in_place", lambda name: in_place_parameters(name, 2)),
        ("lora_smollm2", "lora", lora_parameters),
        ("in_place_qwen3", "in_place", lambda name: in_place_parameters(name, 4)),
    ],
)
def test_the_real_model_gets_as_many_parameters_as_the_formula_says(
    config: str, method: str, expected: Any
) -> None:
    given = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())["model"]["init_args"]
    name = given["pretrained"]["name"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**ARCHITECTURES[name]))
        assert sum(p.numel() for p in model.parameters()) == BASE[name]
        inject_method(
            model,
            method,
            as_config(TTTLoRAPlacement, given.get("ttt_lora"), "ttt_lora"),
            as_config(InPlaceOptions, given.get("in_place"), "in_place"),
            as_config(ProjectionLoRA, given.get("lora"), "lora"),
        )
    added = {n: p.numel() for n, p in model.named_parameters() if parameter_group(n) != "base"}
    assert sum(added.values()) == expected(name)
    assert sum(p.numel() for p in model.parameters()) == BASE[name] + expected(name)


def test_sizes_of_the_methods_beside_a_lora_of_rank_16() -> None:
    small, large = ARCHITECTURES
    assert lora_parameters(small) == 4_884_480 and lora_parameters(large) == 10_092_544
    # At most the LoRA's; the inner size is a whole number, so a few per cent are left over.
    assert 0.9 < ttt_lora_parameters(small) / lora_parameters(small) <= 1
    assert 0.9 < ttt_lora_parameters(large) / lora_parameters(large) <= 1
    assert in_place_parameters(small, 2) == 5_019_840
    assert in_place_parameters(large, 4) == 7_375_872
