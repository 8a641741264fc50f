"""The benchmark of the action expert, shortened: train, evaluate, report, and nothing twice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("gymnasium_robotics")

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "action_expert.py"
SHORT = (
    "--curve",
    "1",
    "--set",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "trainer.log_every_n_steps=1",
    "data.init_args.episodes=12",
    "data.init_args.batch_size=4",
    "model.init_args.denoise_steps=2",
)


def benchmark(command: str, out: Path, *options: str) -> str:
    trials = ["maze/reset", "maze/carry_k8"]
    arguments = [command, "--out", str(out), "--trials", *trials, "--seeds", "0", "--jobs", "2"]
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *arguments, *options], capture_output=True, text=True
    )
    outputs = [path.read_text() for path in out.rglob("output.txt")]
    assert done.returncode == 0, (done.stderr, outputs)
    return done.stdout


@pytest.mark.slow
def test_trials_are_trained_evaluated_reported_and_drawn_once(tmp_path: Path) -> None:
    assert "not trained yet" in benchmark("evaluate", tmp_path)
    assert "train maze/carry_k8 seed_0: done" in benchmark("train", tmp_path, *SHORT)
    assert "done" not in benchmark("train", tmp_path, *SHORT)
    text = benchmark("evaluate", tmp_path)
    assert "| maze/carry_k8 | state carried, k = 8 |" in text
    result = json.loads((tmp_path / "maze" / "carry_k8" / "seed_0" / "result.json").read_text())
    assert result["interval"][0] <= result["success"] <= result["interval"][1]
    assert [chunk for chunk, _, _ in result["norm_by_chunk"]][:3] == [0, 1, 2]
    assert all(norm > 0 for _, norm, _ in result["norm_by_chunk"])
    assert (tmp_path / "results.md").read_text() in text
    assert (tmp_path / "figures" / "maze_norm_by_chunk.png").stat().st_size > 1000
    benchmark("draw", tmp_path)
    assert (tmp_path / "figures" / "maze_paths.png").stat().st_size > 1000
    assert (tmp_path / "figures" / "maze_episodes.gif").read_bytes().startswith(b"GIF89a")
