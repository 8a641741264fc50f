"""The table of adapters and architectures is printed by the checks that the tests run."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import adapter_matrix

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "adapter_matrix.py"


def test_a_failing_check_is_named_in_the_table_and_in_the_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(architecture: str, case: Any) -> None:
        assert architecture != "llama", "as it should"

    monkeypatch.setitem(adapter_matrix.CAPABILITIES, "train", check)
    options = ["--architectures", "gemma", "llama", "--adapters", "noop"]
    monkeypatch.setattr(sys, "argv", ["x", *options, "--capabilities", "train", "bf16"])
    assert adapter_matrix.main() == 1
    out, err = capsys.readouterr()
    assert "| noop | 1/2 (not llama) | 2/2 |" in out
    assert "as it should" in err


@pytest.mark.slow
def test_the_program_prints_a_row_per_architecture_and_adapter() -> None:
    options = ["--architectures", "qwen3", "--adapters", "noop", "ttt", "--full"]
    command = [sys.executable, str(PROGRAM), *options, "--capabilities", "train", "generate"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "| architecture | adapter | train | generate |"
    assert lines[2:4] == ["| qwen3 | noop | yes | yes |", "| qwen3 | ttt | yes | yes |"]
    assert "4 checks in" in done.stdout and "transformers" in done.stdout
