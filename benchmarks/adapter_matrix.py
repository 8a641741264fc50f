"""Check what every adapter can do in every architecture, and print a Markdown table.

    python benchmarks/adapter_matrix.py
    python benchmarks/adapter_matrix.py --adapters ttt --architectures gemma3 llama --full

The checks are those of `tests/adapters/test_architectures.py` (`tests/capabilities.py`), on tiny
random models; `generate` is sampling in pi0. Ends with status 1 if one of them fails.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("", "tests")]

import torch  # noqa: E402
from architecture_cases import ADAPTERS  # noqa: E402
from capabilities import CAPABILITIES, MODELS, models_of  # noqa: E402
from transformers.utils import logging  # noqa: E402

Results = dict[tuple[str, str, str], bool]
"""(architecture, adapter, capability) -> whether its check passed."""


def main() -> int:
    """Parse the command line, run the checks, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, known in (
        ("architectures", MODELS),
        ("adapters", ADAPTERS),
        ("capabilities", CAPABILITIES),
    ):
        parser.add_argument(f"--{name}", nargs="+", choices=list(known), default=list(known))
    parser.add_argument("--full", action="store_true", help="one row per architecture and adapter")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    start, results = time.perf_counter(), {}
    for architecture in options.architectures:
        for adapter in options.adapters:
            if architecture not in models_of(ADAPTERS[adapter]):
                continue
            for capability in options.capabilities:
                key = (architecture, adapter, capability)
                results[key] = passes(*key)
    print((full_table if options.full else table)(results, options.capabilities))
    print(f"\n{len(results)} checks in {time.perf_counter() - start:.0f} s, {machine()}")
    return 0 if all(results.values()) else 1


def passes(architecture: str, adapter: str, capability: str) -> bool:
    """Whether a check passes; the reason goes to stderr if it does not."""
    try:
        CAPABILITIES[capability](architecture, ADAPTERS[adapter])
    except Exception:
        print(f"{architecture}, {adapter}, {capability}:", file=sys.stderr)
        traceback.print_exc()
        return False
    return True


def table(results: Results, capabilities: list[str]) -> str:
    """One row per adapter; a cell counts the architectures, and names those that fail."""
    lines = _header(["adapter"], capabilities)
    for adapter in dict.fromkeys(key[1] for key in results):
        architectures = list(dict.fromkeys(a for a, name, _ in results if name == adapter))
        cells = []
        for capability in capabilities:
            failing = [a for a in architectures if not results[a, adapter, capability]]
            count = f"{len(architectures) - len(failing)}/{len(architectures)}"
            cells.append(f"{count} (not {', '.join(failing)})" if failing else count)
        lines.append(f"| {adapter} | {' | '.join(cells)} |")
    everywhere = dict.fromkeys(key[0] for key in results)
    return "\n".join([*lines, "", f"Architectures: {', '.join(everywhere)}."])


def full_table(results: Results, capabilities: list[str]) -> str:
    """One row per architecture and adapter."""
    lines = _header(["architecture", "adapter"], capabilities)
    for architecture, adapter in dict.fromkeys(key[:2] for key in results):
        cells = [
            "yes" if results[architecture, adapter, capability] else "**no**"
            for capability in capabilities
        ]
        lines.append(f"| {architecture} | {adapter} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _header(names: list[str], capabilities: list[str]) -> list[str]:
    titles = [*names, *capabilities]
    return [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]


def machine() -> str:
    """Where and with what this was run."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return f"one thread, {platform.machine()}, Python {platform.python_version()}, {versions}"


if __name__ == "__main__":
    sys.exit(main())
