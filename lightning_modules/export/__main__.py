"""`python -m lightning_modules.export CHECKPOINT FOLDER`: exit code 0, or 2 for bad input."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(args: list[str] | None = None) -> int:
    """Export a checkpoint.

    Args:
        args: command line without the program's name; None takes it from `sys.argv`.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lightning_modules.export",
        description="Write a checkpoint's model, or adapters without their base, into a folder "
        "that loads without lightning, with a model card.",
    )
    parser.add_argument("checkpoint", type=Path, help="file that fit wrote, e.g. last.ckpt")
    parser.add_argument("folder", type=Path, help="a new or empty folder")
    parser.add_argument(
        "--pretrained",
        help="where the pretrained weights lie now (a hub id or a folder), if they have moved",
    )
    options = parser.parse_args(args)
    from lightning_modules.export import export  # imports take seconds: --help comes first

    try:
        folder = export(options.checkpoint, options.folder, options.pretrained)
    except (OSError, ValueError, KeyError) as error:
        message = error.args[0] if isinstance(error, KeyError) else error
        print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
        return 2
    print(f"exported to {folder}; {folder / 'README.md'} says what it is and how to load it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
