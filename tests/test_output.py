"""What a run prints holds no warning: as a user runs the four small configs, in processes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import cli

ROOT = Path(cli.__file__).parent
WARNING = re.compile(r"warning|deprecated|\.py:\d+: ", re.IGNORECASE)
SMALL = {
    "quickstart": "action_expert",
    "lact_small": "text",
    "memory_small": "memory",
    "ttt_lora_small": "text",
}


def run(command: str, name: str, folder: Path, *options: str) -> str:
    """What `python cli.py COMMAND` prints for a small config, made tiny."""
    configs = [f"configs/{name}.yaml", f"configs/tiny/{SMALL[name]}.yaml"]
    given = [part for config in configs for part in ("--config", config)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), command, *given, *options],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def warnings_in(output: str) -> list[str]:
    return [line for line in output.splitlines() if WARNING.search(line)]


def test_a_warning_is_found() -> None:
    lines = ["/x/y.py:3: slow", "FutureWarning: old", "`f` is deprecated", "/x/y.py is fine"]
    assert warnings_in("\n".join(lines)) == lines[:3]


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_no_command_warns(name: str, tmp_path: Path) -> None:
    output = run("fit", name, tmp_path)
    assert "Tip:" not in output
    program = ROOT / "cli.py"
    assert f"next: python {program} test --config runs/{name}/version_0/config.yaml" in output
    for command in ("validate", "test", "predict"):
        limit = "val" if command == "validate" else command
        few = (f"--trainer.limit_{limit}_batches", "2")
        saved = ("--ckpt_path", f"runs/{name}/version_0/checkpoints/last.ckpt")
        output += run(command, name, tmp_path, *few, *saved)
    assert not warnings_in(output)
