"""Benchmarks as a user runs them, and as modules whose functions a test calls."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[1] / "benchmarks"


def run(program: str, *arguments: str) -> str:
    """What `python benchmarks/PROGRAM ARGUMENTS` prints; it must succeed."""
    command = [sys.executable, str(FOLDER / program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def load(program: str) -> ModuleType:
    """A benchmark as a module, where its own imports are found."""
    spec = importlib.util.spec_from_file_location(Path(program).stem, FOLDER / program)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(FOLDER))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module
