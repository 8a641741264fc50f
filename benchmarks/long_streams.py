"""Streams of a million tokens: memory and time per token must not grow.

    python benchmarks/long_streams.py --out results/long_streams.md
    python benchmarks/long_streams.py --tokens 65536 --variants lact --out lact.md

Small models of every variant read Python's standard library, all files as one stream, byte by byte:
in inference with a cache that carries fast state and window, in training by an optimizer step per
1,024 tokens (tbptt 1). The action expert makes calls of one endless episode instead. Printed are
the speed by quarter of the stream (by CPU time: other processes do not count), the most memory the
process had after a sixteenth of it and at the end, the size of what is carried, and by how much the
state at the end differs from that of a second pass in pieces of other sizes, in float32 and (over
the length of training) in float64.
Every run is a process of its own with one thread; the table goes to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from quickstart import cpu_name
from training_runs import ROOT, machine

PROGRAM = Path(__file__).with_name("long_streams_run.py")
VARIANTS = ("lact", "ttt_lora", "in_place", "memory_bank", "action_expert")
PACKAGES = ("torch", "transformers", "lightning")
HEADER = (
    "| variant | mode | read | tokens per CPU second by quarter | last / first "
    "| peak MB, warm -> end | growth | carried kB | other split, float32 | float64 |"
)


def main() -> None:
    """Parse the command line, run, write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="Markdown file of the table")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--tokens", type=int, default=2**20, help="read in inference")
    parser.add_argument("--training-tokens", type=int, default=2**17, help="read in training")
    parser.add_argument("--calls", type=int, default=2**12, help="of the action expert")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = [HEADER, "|---" * (HEADER.count("|") - 1) + "|"]
    for variant in options.variants:
        for mode in ("inference", "training"):
            lines.append(row(variant, mode, options))
            options.out.write_text("\n".join([*lines, "", *about(options.seed)]) + "\n")
    print(options.out.read_text())


def row(variant: str, mode: str, options: argparse.Namespace) -> str:
    """The line of one variant and mode."""
    acts, infers = variant == "action_expert", mode == "inference"
    short = options.training_tokens
    total = options.calls if acts else options.tokens if infers else short
    common = {"variant": variant, "mode": mode, "seed": options.seed}
    found = run({**common, "total": total, "again": infers})
    apart = [f"{found['difference']:.0e}" if infers else "-", "-"]
    if infers and not acts:
        exact = run({**common, "total": short, "again": True, "dtype": "float64"})
        apart[1] = f"{exact['difference']:.0e}"
    warm, end = found["peak"]
    cells = [
        variant,
        mode,
        f"{total:,}" + (" calls" if acts else ""),
        ", ".join(f"{speed:,.0f}" for speed in found["speed"]),
        f"{found['speed'][-1] / found['speed'][0]:.2f}",
        f"{warm / 1e6:.0f} -> {end / 1e6:.0f}",
        f"{100 * (end / warm - 1):+.1f} %",
        " -> ".join(f"{size / 1e3:,.0f}" for size in dict.fromkeys(found["state"])),
        *apart,
    ]
    return f"| {' | '.join(cells)} |"


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """What a process of its own measures.

    Raises:
        SystemExit: it failed.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, str(PROGRAM), json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"failed: {arguments}")
    return json.loads(done.stdout.splitlines()[-1])


def about(seed: int) -> list[str]:
    """Where and with what this was measured."""
    here = machine(PACKAGES)
    versions = ", ".join(f"{name} {number}" for name, number in here["versions"].items())
    return [f"One thread of {here['machine']} ({cpu_name()}), {versions}, seed {seed}."]


if __name__ == "__main__":
    main()
