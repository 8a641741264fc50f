"""Configs of the memory bank: run, shortened, from the command line, to checkpoint and events."""

import json
from pathlib import Path

import pytest
import torch
from config_cases import CONFIGS, fit_validate_resume, run_folder
from lact_module_cases import save_pretrained
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TINY = CONFIGS / "tiny" / "memory.yaml"
MEMORY = "--model.init_args.memory.memory."
SMALLER = {
    "memory_small": [],
    "memory_scratch": ["--data.chunk_length=256", "--model.init_args.config.num_hidden_layers=2"],
}
ROUTER_TAGS = {"chapter_router/load_entropy/", "chapter_router/top_k_mass/"}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLER)
def test_config_fits_validates_and_goes_on_from_its_checkpoint(
    name: str, run_cli, tmp_path: Path
) -> None:
    options = ["--config", str(CONFIGS / f"{name}.yaml"), "--config", str(TINY), *SMALLER[name]]
    events = fit_validate_resume(run_cli, options, run_folder(tmp_path, name))
    written = set(events.Tags()["scalars"])
    assert {"train/loss", "train/router_balance", "val/loss", "val/accuracy"} <= written
    assert all(any(tag.startswith(prefix) for tag in written) for prefix in ROUTER_TAGS)
    assert "chapter_router/load" in events.Tags()["images"]


@pytest.fixture
def pretrained(tmp_path: Path) -> list[str]:
    """Options for a tiny Qwen3 instead of the model of the hub."""
    folder = save_pretrained(tmp_path)
    options = ["--model.init_args.pretrained.name", folder, "--trainer.precision", "32-true"]
    options += [
        f"{MEMORY}bank.num_rows=64",
        f"{MEMORY}bank.rank=8",
        f"{MEMORY}attention.num_heads=2",
    ]
    options += [f"{MEMORY}router.num_chapters=8", f"{MEMORY}router.block_size=16"]
    return [*options, "--model.init_args.memory.count=1", "--model.init_args.lora.rank=2"]


def assert_checkpoint_holds(path: Path, groups: set[str]) -> None:
    checkpoint = torch.load(path, weights_only=True)
    found = {g["name"].split("/")[0] for g in checkpoint["optimizer_states"][0]["param_groups"]}
    assert found == groups
    names = checkpoint["state_dict"]
    assert names and all("memory" in name or "lora_" in name for name in names)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arm", "groups"),
    [
        ("memory_qwen3_0.6b", "memory", {"memory", "bank"}),
        ("memory_vs_lora", "both", {"memory", "bank", "lora"}),
        ("memory_vs_lora", "lora", {"lora"}),
    ],
)
def test_configs_of_pretrained_models_train_what_their_arm_says(
    name: str, arm: str, groups: set[str], pretrained: list[str], run_cli, tmp_path: Path
) -> None:
    options = ["--config", str(CONFIGS / f"{name}.yaml"), "--config", str(TINY), *pretrained]
    options += ["--data.tokenizer.kind", "bytes", "--data.tokenizer.name", "null"]
    options += ["--data.chunk_length", "64", "--model.init_args.arm", arm]
    run = run_folder(tmp_path, name)
    fit_validate_resume(run_cli, options, run)
    assert_checkpoint_holds(run / "checkpoints" / "last.ckpt", groups)


def save_tokenizer(folder: Path) -> None:
    """One token per byte, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|im_start|>", "<|im_end|>"]
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[1],
        chat_template=(
            "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] "
            "+ '<|im_end|>' + '\\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
        ),
    )
    tokenizer.save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["block", "prompt"])
def test_conversations_train_a_memory_in_a_pretrained_model(
    strategy: str, pretrained: list[str], run_cli, tmp_path: Path
) -> None:
    save_tokenizer(tmp_path / "tokenizer")
    lines = [
        {"prompt": f"What is {n} plus {m}?", "response": f"It is {n + m}."}
        for n in range(8)
        for m in range(8)
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    options = ["--config", str(CONFIGS / "memory_smollm2.yaml"), "--config", str(TINY), *pretrained]
    options += ["--data.source.path", str(tmp_path / "chat.jsonl"), "--data.chunk_length", "96"]
    options += [
        "--data.tokenizer",
        str(tmp_path / "tokenizer"),
        f"{MEMORY}router.strategy={strategy}",
    ]
    run = run_folder(tmp_path, "memory_smollm2")
    fit_validate_resume(run_cli, options, run)
    assert_checkpoint_holds(run / "checkpoints" / "last.ckpt", {"memory", "bank"})


def test_routing_that_reads_the_future_is_refused_on_the_command_line(run_cli) -> None:
    options = ["--config", str(CONFIGS / "memory_small.yaml"), "--config", str(TINY)]
    result = run_cli("fit", *options, f"{MEMORY}router.strategy", "sequence")
    assert result.code != 0
    assert "reads its own targets" in result.err and "Traceback" not in result.err
