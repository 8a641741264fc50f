"""Settings that every test shares; set before threads, the hub and kernels are used."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import settings
from quick_cases import mark_the_others_slow

import cli

# Processes, not threads, use the cores (see the Makefile), and no test may need a download.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Triton looks at it when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The machine decides how long an example takes; the examples are the same in every run.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem() -> Generator[None, Any, Any]:
    """Leave to `make test-all` what a test's mark `quick` does not name."""
    made = yield
    if isinstance(made, list) and made:
        mark_the_others_slow(made)
    return made


@pytest.fixture(autouse=True)
def seed_of_this_test_only() -> Iterator[None]:
    """Forget the seed with which a test ran the command line.

    Lightning keeps it in the environment, and processes that a later test starts with `ddp` would
    seed themselves with it.
    """
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)


class CliResult(NamedTuple):
    """How a run of the command line ended, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        return self.err.strip().splitlines()[-1]


@pytest.fixture
def run_cli(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., CliResult]:
    """Run the command line in this process, in a folder that holds `case.yaml`."""
    from cli_cases import CONFIG  # its classes resolve by short name once imported

    (tmp_path / "case.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cli.py"])

    def run_cli(*args: str) -> CliResult:
        code: int | str | None = 0
        try:
            assert cli.main(list(args)) is None
        except SystemExit as stop:
            code = stop.code
        assert isinstance(code, int)
        return CliResult(code, *capsys.readouterr())

    return run_cli


@pytest.fixture
def fit(run_cli: Callable[..., CliResult]) -> Callable[..., CliResult]:
    """Fit `case.yaml` with further options."""
    return lambda *args: run_cli("fit", "--config", "case.yaml", *args)
