"""The benchmark of k, shortened: trains, measures and reports, and nothing twice."""

import json
from pathlib import Path

import pytest
from benchmark_cases import load, run, run_here

RECALL = ("data.init_args.val_sequences=8", "data.init_args.train_sequences=40")
MAZE = ("data.init_args.episodes=12", "model.init_args.denoise_steps=2")


@pytest.mark.slow
@pytest.mark.parametrize(("task", "changes"), [("recall", RECALL), ("maze", MAZE)])
def test_every_k_reads_as_many_chunks_and_is_reported_once(
    task: str, changes: tuple[str, ...], tmp_path: Path
) -> None:
    if task == "maze":
        pytest.importorskip("gymnasium_robotics")
    which = ["--out", str(tmp_path), "--trials", f"{task}/k1", f"{task}/k2", "--seeds", "0"]
    short = ["--set", *changes, "data.init_args.batch_size=4", "trainer.log_every_n_steps=1"]
    text = run_here("tbptt.py", "run", *which, "--chunks", "16", *short)
    assert f"evaluate {task}/k2 seed_0: done" in text and "Trained on" in text
    assert "done" not in run("tbptt.py", "run", *which, "--chunks", "16", *short)
    assert (tmp_path / "results.md").read_text().strip() in text
    kept = []
    for k in (1, 2):
        folder = tmp_path / task / f"k{k}" / "seed_0"
        result = json.loads((folder / "result.json").read_text())
        kept.append(result["cost"]["saved_bytes"])
        steps = result["training"]["curves"]["train/loss"][-1][0] + 1
        assert steps * k == 16
        if task == "recall":
            assert [distance for distance, _ in result["by_distance"]] == [1, 2, 3]
    assert 1.5 < kept[1] / kept[0] < 2.5


def test_chunks_that_do_not_fill_the_steps_are_refused() -> None:
    benchmark = load("tbptt.py")
    trial = benchmark.TRIALS["recall/k4"]
    assert trial.schedule()["trainer.max_steps"] == 400
    with pytest.raises(ValueError, match="chunks=8 must be a multiple of 16 with k=4"):
        trial.schedule(8)
