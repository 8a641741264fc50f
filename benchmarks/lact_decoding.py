"""What a token costs in decoding, after a short and after a long history.

    python benchmarks/lact_decoding.py --out decoding.md

A LaCT model reads a history of 1k to 100k tokens chunk by chunk, then decodes token by token with
its `FastStateCache`; beside it the same model with full attention instead, whose keys and values
grow. Medians over the decoded tokens, the 10th and 90th percentile, and the bytes that the cache
holds. Random weights: the cost does not depend on them.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from lightning_modules.generation import FastStateCache
from lightning_modules.models.lact import LaCTForCausalLM
from lightning_modules.models.lact_config import LaCTConfig

SIZES = {
    "vocab_size": 259,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attn_heads": 4,
    "num_lact_heads": 2,
    "window_size": 256,
    "lact_chunk_size": 256,
    "initializer_range": 0.02,
}
ARMS = {
    "LaCT, window 256": {},
    "LaCT, window 256, r = 2": {"r": 2, "residual_ttt": True},
    "full attention": {"branches": "attention", "window_size": None},
}
LONGEST = {"full attention": 10_000}
"""Reading 100,000 tokens takes such a model most of an hour on a CPU."""

PIECE = 1024
"""Tokens of the history that are read in one call."""


def main() -> None:
    """Parse the command line, measure, print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    lengths = [1_000, 10_000, 100_000]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths, help="histories")
    parser.add_argument("--tokens", type=int, default=300, help="tokens that are decoded and timed")
    parser.add_argument("--out", type=Path, help="file of the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    titles = "| model | history | ms per token [p10, p90] | cache MiB |"
    lines = [titles, "|---|---|---|---|"]
    print("\n".join(lines))
    for name, changes in ARMS.items():
        torch.manual_seed(0)
        model = LaCTForCausalLM(LaCTConfig(**{**SIZES, **changes})).eval()
        for length in options.lengths:
            if length > LONGEST.get(name, length):
                continue
            times, size = decode(model, length, options.tokens)
            low, median, high = times.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
            cell = f"{median:.2f} [{low:.2f}, {high:.2f}]"
            lines.append(f"| {name} | {length:,} | {cell} | {size / 2**20:.1f} |")
            print(lines[-1], flush=True)
    lines += ["", machine()]
    print(f"\n{machine()}")
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n")


@torch.no_grad()
def decode(model: LaCTForCausalLM, length: int, tokens: int) -> tuple[Tensor, int]:
    """Milliseconds of every decoded token, float32 `[tokens]`, and bytes of the cache."""
    cache = FastStateCache(model.config)
    history = torch.randint(model.config.vocab_size, (1, length))
    for piece in history.split(PIECE, dim=1):
        logits = model(piece, past_key_values=cache, logits_to_keep=1).logits
    times = []
    for _ in range(tokens):
        start = time.perf_counter()
        logits = model(logits.argmax(-1), past_key_values=cache).logits
        times.append(1000 * (time.perf_counter() - start))
    size = sum(x.nbytes for fields in cache.slots.values() for x in fields.values())
    return torch.tensor(times), size


def machine() -> str:
    """Where and with what this was measured."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return (
        f"One thread of {os.cpu_count()} cores, {platform.machine()}, Python "
        f"{platform.python_version()}, {versions}; batch 1, float32, weights and tokens of seed 0."
    )


if __name__ == "__main__":
    main()
