"""The walk-throughs do what they show: their commands run, and their output is that of the page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("walkthrough_*.md"))
LANGUAGES = "python|bash|text|yaml|json"
BLOCK = re.compile(rf"^```({LANGUAGES})(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?:e[-+]\d+)?")


def masked(text: str) -> list[str]:
    """Lines without numbers, which differ from machine to machine, and without runs of spaces."""
    return [" ".join(NUMBER.sub("#", line).split()) for line in text.splitlines() if line.strip()]


def missing(shown: str, output: str) -> list[str]:
    """Lines of the page that are not in the output, in this order; `...` stands for any lines."""
    rest, lost = masked(output), []
    for line in masked(shown):
        if line == "...":
            continue
        if line in rest:
            rest = rest[rest.index(line) + 1 :]
        else:
            lost.append(line)
    return lost


def run(command: str, folder: Path) -> str:
    """What a command prints, standard error included; it must end well."""
    binaries = Path(sys.executable).parent
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def walk(page: Path, folder: Path) -> int:
    """Write the files of a page, run its commands, compare what it shows; how much was shown."""
    for name in ("cli.py", "configs", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    output, shown = "", 0
    for language, name, body in BLOCK.findall(page.read_text()):
        if name:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(body)
        elif language == "bash":
            output = run(body, folder)
        elif language == "text":
            assert not missing(body, output), f"{missing(body, output)} is not in\n{output}"
            shown += len(masked(body))
    return shown


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs_as_it_is_written(page: Path, tmp_path: Path) -> None:
    assert walk(page, tmp_path) > 3


def test_a_page_that_shows_something_else_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```bash\necho loss 1.5; echo done\n```\n\n```text\nloss 2.75\ndone\n```\n")
    (tmp_path / "right").mkdir()
    assert walk(page, tmp_path / "right") == 2
    for number, other in enumerate(("lost 2.75\ndone", "done\nloss 2.75", "loss 2.75 ms\ndone")):
        page.write_text(f"```bash\necho loss 1.5; echo done\n```\n\n```text\n{other}\n```\n")
        (tmp_path / str(number)).mkdir()
        with pytest.raises(AssertionError):
            walk(page, tmp_path / str(number))
