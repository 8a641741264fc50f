"""`python -m callbacks.diagnose RUN_DIR`: exit code 0 without findings, 1 with, 2 for bad input."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from callbacks.diagnose import RunError, diagnose, read_run
from callbacks.diagnose.report import report


def main(args: list[str] | None = None) -> int:
    """Print what looks wrong in a run.

    Args:
        args: command line without the program's name; None takes it from `sys.argv`.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m callbacks.diagnose",
        description="Say what looks wrong in a run, on which evidence, and what to turn.",
        epilog="exit code: 0 nothing was found, 1 something was found, 2 there is no run to read",
    )
    parser.add_argument(
        "run_dir", type=Path, help="folder with the TensorBoard files of a run (version_0)"
    )
    folder = parser.parse_args(args).run_dir
    try:
        run = read_run(folder)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    findings = diagnose(run)
    print(report(run, findings))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
