"""The comparison of adapters, shortened: every arm trained, read with memory on and off, judged."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from benchmark_cases import load, run, run_here
from config_cases import CONFIGS, fit_validate_resume, run_folder
from lact_module_cases import save_pretrained, write_texts
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import LlamaConfig

CONFIG = CONFIGS / "compare_lora_ttt.yaml"
TINY = CONFIGS / "tiny" / "text.yaml"
TRIALS = ("base/0", "lora/0.001", "lora/0.002", "ttt_reset/0.008", "ttt/0.008", "in_place/0.004")
CHUNK = 96


def settings(folder: Path) -> dict[str, object]:
    """A tiny Qwen3 on files of up to 400 bytes instead of SmolLM2 on the standard library."""
    texts = write_texts(folder, count=40)
    return {
        "model.init_args.pretrained.name": save_pretrained(folder),
        "model.init_args.ttt_lora.match_rank": 4,
        "model.init_args.ttt_lora.learner.mini_batch_size": 8,
        "model.init_args.in_place.layer.chunk_size": 16,
        "model.init_args.lora.rank": 4,
        "data.init_args.tokenizer.kind": "bytes",
        "data.init_args.tokenizer.name": "null",
        "data.init_args.source.kind": "files",
        "data.init_args.source.path": texts,
        "data.init_args.chunk_length": CHUNK,
        "data.init_args.min_tokens": 100,
        "data.init_args.val_fraction": 0.4,
        "data.init_args.batch_size": 2,
    }


SHORT = {
    "trainer.max_steps": 4,
    "trainer.val_check_interval": 2,
    "trainer.log_every_n_steps": 1,
    "trainer.limit_val_batches": 2,
}


@pytest.mark.slow
def test_all_arms_are_trained_read_and_judged(tmp_path: Path) -> None:
    which = ["--out", str(tmp_path / "out"), "--seeds", "0", "--jobs", "2"]
    changes = ["--set", *(f"{k}={v}" for k, v in {**settings(tmp_path), **SHORT}.items())]
    assert "nothing to report" in run("compare_adapters.py", "report", *which)
    trials = ["--trials", *TRIALS, "ttt+lora/0.002"]
    done = run_here("compare_adapters.py", "train", *which, *trials, *changes)
    assert all(f"train {trial} seed_0: done" in done for trial in (*TRIALS, "ttt+lora/0.002"))
    assert "done" not in run_here("compare_adapters.py", "train", *which, *trials, *changes)
    text = run_here("compare_adapters.py", "evaluate", "--best", *which, *trials)
    assert (tmp_path / "out" / "results.md").read_text().strip() in text
    decision = text[text.index("**") :].split("\n")[0]
    assert decision.startswith(("**Better:", "**Equal:", "**Worse:"))
    for row in ("| ttt - lora |", "| ttt - ttt_reset |", "| in_place - lora |", "| ttt | "):
        assert row in text
    figures = tmp_path / "out" / "figures"
    assert all(path.stat().st_size > 1000 for path in figures.iterdir())
    assert len(list(figures.iterdir())) == 2
    rates = [path.parts[-3] for path in (tmp_path / "out" / "lora").glob("*/*/result.json")]
    check_best_rate(tmp_path / "out", rates)
    check_losses(tmp_path / "out")
    check_memory(tmp_path / "out")
    best = [*which[:2], "--seeds", "1", "--trials", "lora/*"]
    again = run_here("compare_adapters.py", "train", "--best", *best, *changes)
    done = [line for line in again.splitlines() if line.startswith("train")]
    assert len(done) == 1 and f"lora/{rates[0]} seed_1: done" in done[0]


def check_best_rate(out: Path, evaluated: list[str]) -> None:
    losses = {}
    for path in (out / "lora").glob("*/seed_0/training.json"):
        losses[path.parts[-3]] = json.loads(path.read_text())["curves"]["val/loss"][-1][1]
    assert len(losses) == 2 and evaluated == [min(losses, key=losses.__getitem__)]


def check_losses(out: Path) -> None:
    """Sums by file and position are those of the validation that the command line logs."""
    results = list(results_of(out))
    assert len(results) == 6
    counts = []
    for folder, result in results:
        stored = np.load(folder / "reading.npz")
        logged = EventAccumulator(str(folder / "log_reading")).Reload().Scalars("val/loss")
        # Lightning logs float32.
        assert stored["total"].sum() / stored["count"].sum() == pytest.approx(
            logged[-1].value, rel=1e-6
        )
        assert stored["starts"].tolist()[:4] == [0, 64, CHUNK, 2 * CHUNK]
        lengths = stored["count"].sum(axis=1)
        sizes = [(out.parent / "texts" / name).stat().st_size for name in stored["names"]]
        assert (lengths == np.array(sizes) + 1).all() and min(sizes) >= 98  # bos and eos
        assert (stored["count"][:, :2] <= [64, CHUNK - 64]).all()
        counts.append(stored["count"])
        assert result["tokens_per_second"] > 0 and result["peak_memory"] > 1e6
    assert all(np.array_equal(counts[0], count) for count in counts)


def check_memory(out: Path) -> None:
    """With the memory off only first chunks are read as before, and the monitors are kept."""
    results = {result["trial"]: (folder, result) for folder, result in results_of(out)}
    for trial in ("ttt/0.008", "ttt+lora/0.002"):
        folder, result = results[trial]
        on, off = (np.load(folder / f"{n}.npz")["total"] for n in ("reading", "reading_reset"))
        assert np.allclose(on[:, :2], off[:, :2], rtol=1e-6)  # rows beside it differ
        assert not np.allclose(on[:, 2:], off[:, 2:], rtol=1e-6)
        memory = result["memory"]
        assert memory["inner loss after"]["mean"] < memory["inner loss before"]["mean"]
        assert 0 < memory["eta"]["mean"] < 1 and memory["relative change"]["mean"] > 0
        assert memory["state norm"]["by_chunk"] != result["reset"]["memory"]["state norm"]
    assert results["in_place/0.004"][1]["memory"]["relative change"]["mean"] > 0
    assert results["ttt_reset/0.008"][1]["reset"] is None
    assert results["base/0"][1]["parameters"] == 0 and not results["base/0"][1]["memory"]
    orders = {name: data_of(folder) for name, (folder, _) in results.items()}
    assert len({str(order) for order in orders.values()}) == 1


def results_of(out: Path) -> Iterator[tuple[Path, dict]]:
    for path in sorted(out.rglob("result.json")):
        yield path.parent, json.loads(path.read_text())


def data_of(folder: Path) -> dict:
    """What is read, and in which order."""
    return yaml.safe_load((folder / "config.yaml").read_text())["data"]


@pytest.mark.slow
def test_in_place_is_matched_to_the_lora_as_a_search_by_hand_finds() -> None:
    """SmolLM2: a LoRA of rank 16 has 4,884,480 parameters, an MLP's targets 576^2 + 5 576."""
    trials = load("compare_trials.py")
    options = yaml.safe_load(CONFIG.read_text())["model"]["init_args"]
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=100,
    )
    wanted = 30 * 16 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
    assert trials.adapter_size(config, "lora", options) == wanted == 4_884_480
    sizes = {n: (30 // n) * (576**2 + 5 * 576) for n in range(1, 31)}
    nearest = min(sizes, key=lambda n: abs(sizes[n] - wanted))
    options["in_place"]["every_n"] = nearest
    assert trials.adapter_size(config, "in_place", options) == sizes[nearest]
    assert trials.nearest_in_place(config, options) == nearest == 2
    assert 0.9 < trials.adapter_size(config, "ttt_lora", options) / wanted <= 1


def test_a_run_whose_last_steps_no_checkpoint_holds_is_refused() -> None:
    check = load("compare_adapters.py").check_checkpoints
    trainer = {"callbacks": [{"class_path": "M", "init_args": {"every_n_train_steps": 50}}]}
    for steps in (4, 50, 300):
        check({**trainer, "max_steps": steps})
    with pytest.raises(SystemExit, match="multiple of 50"):
        check({**trainer, "max_steps": 310})


@pytest.mark.slow
def test_config_fits_validates_and_goes_on_from_its_checkpoint(run_cli, tmp_path: Path) -> None:
    options = ["--config", str(CONFIG), "--config", str(TINY)]
    for key, value in settings(tmp_path).items():
        options += [f"--{key}", str(value)]
    events = fit_validate_resume(run_cli, options, run_folder(tmp_path, CONFIG.stem))
    written = set(events.Tags()["scalars"])
    assert {"train/loss", "val/loss", "chunk_loss/chunk_01"} <= written
    assert any(tag.startswith("fast_weight/relative_change/") for tag in written)
