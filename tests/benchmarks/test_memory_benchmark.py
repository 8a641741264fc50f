"""The benchmark of the memory bank, shortened: trained, the best rate chosen, reported."""

import json
from pathlib import Path

import pytest
from benchmark_cases import run
from lact_module_cases import save_pretrained, write_texts

SHORT = (
    "--set",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "trainer.log_every_n_steps=1",
    "trainer.limit_val_batches=2",
    "data.init_args.batch_size=2",
)
SMALL = (
    "data.init_args.tokenizer.vocab_size=300",
    "model.init_args.config.num_hidden_layers=2",
    "model.init_args.config.hidden_size=64",
)
MEMORY = "model.init_args.memory.memory."


@pytest.mark.slow
def test_arms_from_scratch_are_trained_measured_and_the_best_rate_goes_on(tmp_path: Path) -> None:
    which = ["--out", str(tmp_path), "--trials", "scratch/block/0.00[12]", "scratch/equal_flops/*1"]
    run("memory.py", "train", *which, "--seeds", "0", *SHORT, *SMALL)
    text = run("memory.py", "evaluate", *which, "--seeds", "0")
    assert "| scratch/block | bank, routed by block | 0.00" in text and "Trained on" in text
    results = [json.loads(path.read_text()) for path in tmp_path.rglob("result.json")]
    assert len(results) == 3 and all(r["flops_per_token"] > 0 for r in results)
    best = min((r["loss"], r["trial"]) for r in results if "block" in r["trial"])[1]
    done = run("memory.py", "train", "--best", *which[:2], "--seeds", "1", *SHORT, *SMALL)
    trained = [line for line in done.splitlines() if "seed_1: done" in line]
    assert len(trained) == 2 and any(f"train {best} seed_1" in line for line in trained)


@pytest.mark.slow
def test_adapters_are_measured_on_other_text_too(tmp_path: Path) -> None:
    folder, texts = save_pretrained(tmp_path), write_texts(tmp_path)
    which = ["--out", str(tmp_path / "out"), "--trials", "adapter/both/0.001", "--seeds", "0"]
    sizes = ["bank.num_rows=64", "bank.rank=8", "attention.num_heads=2", "router.num_chapters=8"]
    options = [f"model.init_args.pretrained.name={folder}", "data.init_args.tokenizer.kind=bytes"]
    options += ["data.init_args.tokenizer.name=null", "data.init_args.chunk_length=64"]
    options += ["model.init_args.memory.count=1", f"{MEMORY}router.block_size=16"]
    options += [f"{MEMORY}{size}" for size in sizes]
    run("memory.py", "train", *which, "--held-out", str(texts), *SHORT, *options)
    text = run("memory.py", "evaluate", *which)
    assert "loss on other text" in text
    (path,) = (tmp_path / "out").rglob("result.json")
    result = json.loads(path.read_text())
    assert result["held_out"] > 0 and result["held_out"] != result["loss"]
