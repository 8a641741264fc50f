"""Leak canary: does a router read the future?

    python benchmarks/leak_canary.py --seeds 0 1 2

Tokens are independent and uniform over V = 32, so that no causal model can have a loss below ln V
on fresh ones. A small Llama with a memory bank is trained on them under every routing strategy and
measured on 100,000 others; for `sequence` also with nothing behind the token that is predicted.
"""

from __future__ import annotations

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from training_runs import machine
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_modules.adapters import as_config
from lightning_modules.models.memory import inject_memory
from lightning_modules.models.memory_options import MemoryOptions

VOCABULARY, LENGTH, ROWS, STEPS, BATCHES = 32, 8, 64, 300, 200
CHANCE = math.log(VOCABULARY)
PROMPT = (torch.arange(LENGTH) < 2).expand(ROWS, -1)
STRATEGIES = ("token", "block", "rolling", "prompt", "sequence")


def trained(strategy: str, seed: int = 0, **router: object) -> LlamaForCausalLM:
    """A model of one layer with 32 chapters of 4 rows, after 300 steps on fresh tokens.

    Args:
        strategy: of the router.
        seed: of weights and tokens.
        **router: further options of the router.
    """
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=1, **sizes))
    options = {
        "num_chapters": 32,
        "top_k": 2,
        "strategy": strategy,
        "block_size": 2,
        "window": 4,
        "allow_non_causal": True,
        **router,
    }
    memory = {"bank": {"num_rows": 128}, "attention": {"num_heads": 2}, "router": options}
    inject_memory(model, as_config(MemoryOptions, {"memory": memory}, "memory"))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses(model, *draw()).mean().backward()
        optimizer.step()
    return model.eval()


def draw() -> tuple[Tensor, Tensor]:
    """Inputs and labels `[64, 8]`, fresh in every call."""
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH + 1))
    return ids[:, :-1], ids[:, 1:]


def losses(model: LlamaForCausalLM, inputs: Tensor, labels: Tensor) -> Tensor:
    """Loss of every token in nats, `[64, T]`."""
    prompt = PROMPT[:, : inputs.shape[1]]
    logits = model(input_ids=inputs, use_cache=False, prompt_mask=prompt).logits
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


@torch.no_grad()
def measured(model: LlamaForCausalLM, prefixes: bool = False) -> tuple[float, float]:
    """Mean loss of fresh tokens and its standard error.

    Args:
        model: trained.
        prefixes: measure every token as the last one of its sequence.
    """
    found = []
    for _ in range(BATCHES):
        inputs, labels = draw()
        if not prefixes:
            found.append(losses(model, inputs, labels).flatten())
        for end in range(1, LENGTH + 1) if prefixes else ():
            found.append(losses(model, inputs[:, :end], labels[:, :end])[:, -1])
    values = torch.cat(found)
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


def main() -> None:
    """Print a row per strategy."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"ln V = {CHANCE:.4f}\n\n| routing | loss (standard error), by seed |\n|---|---|")
    for strategy in STRATEGIES:
        models = [trained(strategy, seed) for seed in options.seeds]
        for prefixes in (False, True) if strategy == "sequence" else (False,):
            cells = [f"{loss:.4f} ({error:.4f})" for loss, error in _all(models, prefixes)]
            name = f"{strategy}, token by token" if prefixes else strategy
            print(f"| {name} | {', '.join(cells)} |", flush=True)
    print(f"\n{machine(('torch', 'transformers'))}")


def _all(models: list[LlamaForCausalLM], prefixes: bool) -> list[tuple[float, float]]:
    return [measured(model, prefixes) for model in models]


if __name__ == "__main__":
    main()
