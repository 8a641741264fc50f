"""Benchmarks as a user runs them, in a process that has imported, and as modules to call."""

import contextlib
import importlib.util
import io
import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

FOLDER = Path(__file__).parents[1] / "benchmarks"
PRELOAD = (
    "cli", "tensorboard.backend.event_processing.event_accumulator", "lightning.pytorch.cli",
    "callbacks.closed_loop", "datamodules.action_chunks", "datamodules.text_streams",
    "lightning_modules.action_expert", "lightning_modules.lact", "lightning_modules.ttt_lora",
    "transformers.models.llama.modeling_llama", "transformers.models.qwen3.modeling_qwen3",
)  # fmt: skip
"""What runs import; a process that starts from scratch takes seven seconds for it."""


def run(program: str, *arguments: str) -> str:
    """What `python benchmarks/PROGRAM ARGUMENTS` prints; it must succeed."""
    command = [sys.executable, str(FOLDER / program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_here(program: str, *arguments: str) -> str:
    """As `run`, but in this process, and its runs in copies of one that has imported everything.

    For benchmarks of many runs (`training_runs.run_all`), most of whose time is imports.
    """
    module, printed = load(program), io.StringIO()
    runs = sys.modules["training_runs"].subprocess
    with (
        mock.patch.object(sys, "argv", [str(FOLDER / program), *arguments]),
        mock.patch.object(runs, "run", _run_in_a_copy),
        contextlib.redirect_stdout(printed),
    ):
        module.main()
    return printed.getvalue()


def _run_in_a_copy(
    command: list[str], stdout: Any, stderr: Any, env: dict[str, str], check: bool
) -> subprocess.CompletedProcess:
    """`subprocess.run` of a program in Python."""
    assert command[0] == sys.executable and stdout is stderr and not check
    # The server keeps quiet about a name that it cannot import.
    assert all(importlib.util.find_spec(name) for name in PRELOAD)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    process = context.Process(target=_main, args=(command[1:], stdout.name, env))
    process.start()
    process.join()
    return subprocess.CompletedProcess(command, process.exitcode)


def _main(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))
    runpy.run_path(arguments[0], run_name="__main__")


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
