"""All ops with kernels, one after the other: the machine's ceilings, errors, times, shares, ratios.

    python benchmarks/ops.py --out ops.md                   # on a GPU, about 15 minutes
    python benchmarks/ops.py --ops lact chapter_attention
    python benchmarks/ops.py --tiny                         # a minute on a CPU: whether they run

Each op has a program of its own (`ops_<name>.py`), whose docstring says what is counted and who its
peer is, and with options of its own: single cases, the time of each kernel. It runs in its own
process here, so that an op that fails costs its own table alone; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from training_runs import machine

FOLDER = Path(__file__).parent
TINY = {
    "ttt_lora": ["--tiny", "--repeats", "2"],
    "lact": ["--cases", "tiny", "tiny_muon", "--device", "cpu", "--repeats", "2"],
    "chapter_attention": ["--tiny", "--device", "cpu", "--repeats", "1"],
}
"""Options for a short run; `ttt_linear`'s program compares with kernels alone, and needs a GPU."""
OPS = ("ttt_linear", *TINY)


def run(name: str, arguments: list[str]) -> tuple[str, bool]:
    """What an op's program prints, also as it prints it, and whether it ended well."""
    command = [sys.executable, "-u", str(FOLDER / f"ops_{name}.py"), *arguments]
    lines = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return "".join(lines), process.returncode == 0


def main() -> int:
    """Run the ops, and write what they print as sections of one file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", nargs="+", choices=OPS)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, help="file to write")
    options = parser.parse_args()
    chosen = options.ops or (list(TINY) if options.tiny else list(OPS))
    if options.tiny and (missing := set(chosen) - TINY.keys()):
        parser.error(f"{', '.join(missing)} has no short run on a CPU: leave it out of --ops")
    sections, good = [str(machine(("torch",)))], True
    for name in chosen:
        print(f"\n## {name}\n", flush=True)
        text, ended = run(name, TINY[name] if options.tiny else [])
        sections.append(f"## {name}\n\n{text}")
        good = good and ended
        if options.out:
            options.out.write_text("\n\n".join(sections))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
