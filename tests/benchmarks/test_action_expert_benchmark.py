"""The benchmark of the action expert, shortened: train, evaluate, report, and nothing twice."""

import json
from pathlib import Path

import pytest
from benchmark_cases import run, run_here

pytest.importorskip("gymnasium_robotics")

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


def arguments(command: str, out: Path, *options: str) -> list[str]:
    trials = ["--trials", "maze/reset", "maze/carry_k8", "--seeds", "0", "--jobs", "2"]
    return ["action_expert.py", command, "--out", str(out), *trials, *options]


@pytest.mark.slow
def test_trials_are_trained_evaluated_reported_and_drawn_once(tmp_path: Path) -> None:
    assert "not trained yet" in run(*arguments("evaluate", tmp_path))
    assert "train maze/carry_k8 seed_0: done" in run_here(*arguments("train", tmp_path, *SHORT))
    assert "done" not in run_here(*arguments("train", tmp_path, *SHORT))
    text = run_here(*arguments("evaluate", tmp_path))
    assert "| maze/carry_k8 | state carried, k = 8 |" in text
    result = json.loads((tmp_path / "maze" / "carry_k8" / "seed_0" / "result.json").read_text())
    assert result["interval"][0] <= result["success"] <= result["interval"][1]
    assert [chunk for chunk, _, _ in result["norm_by_chunk"]][:3] == [0, 1, 2]
    assert all(norm > 0 for _, norm, _ in result["norm_by_chunk"])
    assert (tmp_path / "results.md").read_text() in text
    assert (tmp_path / "figures" / "maze_norm_by_chunk.png").stat().st_size > 1000
    run_here(*arguments("draw", tmp_path))
    assert (tmp_path / "figures" / "maze_paths.png").stat().st_size > 1000
    assert (tmp_path / "figures" / "maze_episodes.gif").read_bytes().startswith(b"GIF89a")
