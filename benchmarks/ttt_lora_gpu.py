"""A training step of a 0.6B language model with TTT-LoRA, In-Place TTT, peft's LoRA, or neither.

    python benchmarks/ttt_lora_gpu.py --out ttt_lora_gpu.md     # on a GPU
    python benchmarks/ttt_lora_gpu.py --modes eager default     # also compiled: minutes for an arm
    python benchmarks/ttt_lora_gpu.py --tiny                    # a few seconds on a CPU
    python benchmarks/ttt_lora_gpu.py --count                   # launches per layer, on a CPU

Qwen3-0.6B's body with random weights in bfloat16, B = 8, T = 2,048, adapters in every linear layer
of attention and MLPs (In-Place TTT: every 4th MLP), parameters of a LoRA of rank 16, mini-batches
of 16 tokens, carried state. Forward, cross entropy and backward; medians with the 10th and 90th
percentile of `--repeats` calls after three warm-up calls, from device events. The loss of the
output layer is in all arms; ratios are to the first row of LoRA. Peak memory is of the whole step.
Before it is timed, a new adapter must compute what the base does, bit for bit.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from launches import per_layer
from torch import Tensor, nn
from torch.nn import functional as F
from training_runs import machine
from transformers import Qwen3Config, Qwen3ForCausalLM

from lightning_modules.layers import ttt_lora as layer
from lightning_modules.layers.in_place_mlp import InPlaceConfig
from lightning_modules.layers.ttt_lora import TTTLoRAOptions
from lightning_modules.models.in_place import InPlaceOptions
from lightning_modules.models.projection_lora import ProjectionLoRA
from lightning_modules.models.ttt_lora import TTTLoRAPlacement, inject_method
from lightning_modules.ops import ttt_lora_cell
from lightning_modules.streams import FastState

SIZES = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
TINY = SIZES | {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
ARMS = {
    "base, all weights trained": ("none", {}),
    "base, frozen": ("frozen", {}),
    "peft LoRA, rank 16": ("lora", {}),
    "In-Place TTT, every 4th layer": ("in_place", {}),
    "TTT-LoRA, m = 16": ("ttt_lora", {}),
    "TTT-LoRA, m = 16, torch backend": ("ttt_lora", {}),
    "TTT-LoRA, m = 16, a linear layer at a time": ("ttt_lora", {"group_siblings": False}),
    "TTT-LoRA, m = 64": ("ttt_lora", {"learner": TTTLoRAOptions(mini_batch_size=64)}),
}
MODES = ("eager", "default", "reduce-overhead")
"""How the model runs: as it is, or compiled in a mode of torch.compile; the last records CUDA
graphs."""


def make_model(method: str, placement: dict[str, Any], sizes: dict[str, Any], device: str) -> Any:
    """A model with its adapters, in bfloat16 with adapters in float32 (float32 on a CPU)."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = Qwen3ForCausalLM(Qwen3Config(**sizes)).to(dtype).train()
    if method == "none":
        return model
    model.requires_grad_(False)
    model.enable_input_require_grads()
    if method != "frozen":
        given = {"learner": TTTLoRAOptions(mini_batch_size=16)} | placement
        in_place = InPlaceOptions(4, InPlaceConfig(chunk_size=512))
        inject_method(model, method, TTTLoRAPlacement(**given), in_place, ProjectionLoRA(16, 16.0))
    return model


def make_forward(model: nn.Module, ids: Tensor, carries: bool) -> Callable[[], Tensor]:
    """The loss of one chunk, with the state of the chunk before."""
    handle, trained = FastState(), [p for p in model.parameters() if p.requires_grad]

    def forward() -> Tensor:
        nonlocal handle
        for parameter in trained:
            parameter.grad = None
        given = {"fast_state": handle} if carries else {}
        torch.compiler.cudagraph_mark_step_begin()
        logits = model(input_ids=ids[:, :-1], use_cache=False, **given).logits
        if carries:
            handle = handle.map(Tensor.detach)
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    return forward


def make_step(model: nn.Module, ids: Tensor, carries: bool) -> Callable[[], Tensor]:
    """Forward and backward of one chunk."""
    forward = make_forward(model, ids, carries)

    def step() -> Tensor:
        loss = forward()
        loss.backward()
        return loss.detach()

    return step


def measure(step: Callable[[], Tensor], repeats: int, device: str) -> tuple[list[float], float]:
    """Milliseconds of every call, and the peak in GiB (0 on a CPU)."""
    for _ in range(3):
        step()
    times = []
    if device != "cuda":
        for _ in range(repeats):
            began = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - began))
        return times, 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return times, torch.cuda.max_memory_allocated() / 2**30


def rows(
    options: argparse.Namespace, sizes: dict[str, Any], shape: tuple[int, int], device: str
) -> list[str]:
    """A line of the table for every mode and arm, or for arms whose names have a word of --only."""
    ids = torch.randint(0, sizes["vocab_size"], (shape[0], shape[1] + 1), device=device)
    lines, expected, lora = [], None, None
    for mode, (name, (method, placement)) in product(options.modes, ARMS.items()):
        if options.only and not any(word in name for word in options.only):
            continue
        backend = "torch" if name.endswith("torch backend") else "auto"
        layer.ttt_lora_cell = partial(ttt_lora_cell, backend=backend)
        model = make_model(method, placement, sizes, device)
        with torch.no_grad():
            logits = model(input_ids=ids[:1, :-1], use_cache=False).logits
        expected = logits if expected is None else expected
        same = "yes" if torch.equal(logits, expected) else "NO"
        del logits
        if mode != "eager":
            torch._dynamo.reset()
            model.compile(mode=mode)
            name = f"{name}; {mode}"
        step = make_step(model, ids, method in ("ttt_lora", "in_place"))
        times, peak = measure(step, options.repeats, device)
        low, *_, high = statistics.quantiles(times, n=10)
        median = statistics.median(times)
        lora = median if method == "lora" and lora is None else lora
        ratio = f"{median / lora:.2f}" if lora else ""
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        cells = f"{median:.1f} [{low:.1f}, {high:.1f}] | {ratio} | {peak:.1f}"
        lines.append(f"| {name} | {cells} | {trained:,} | {same} |")
        print(lines[-1], flush=True)
        del model, step
        if device == "cuda":
            torch.cuda.empty_cache()
    return lines


def count() -> list[str]:
    """Launches per layer of some arms: a base in bfloat16, adapters in float32, as on a GPU."""
    ids = torch.randint(0, 300, (1, 17))
    lines = []
    for method in ("frozen", "lora", "ttt_lora"):

        def build(depth: int, tiny: bool, method: str = method) -> Callable[[], Tensor]:
            sizes = (TINY if tiny else SIZES) | {"vocab_size": 300, "num_hidden_layers": depth}
            model = make_model(method, {}, sizes, "cpu")
            for parameter in model.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()
            return make_forward(model, ids, method == "ttt_lora")

        found = per_layer(build)
        sums = [sum(x.values()) for x in (found.forward, found.backward)]
        lines.append(f"| {method} | {sums[0]} | {sums[1]} | {sum(sums)} | {found.host:.2f} |")
        for name, counts in zip(("forward", "backward"), found[:2], strict=True):
            print(method, name, dict(counts.most_common()))
    return lines


def main() -> None:
    """Print a table, and write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--count", action="store_true", help="launches per layer, nothing else")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=[], help="words in the names of arms to run")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["eager"])
    parser.add_argument("--out", type=Path, help="file to write")
    options = parser.parse_args()
    if options.count:
        head = "| per layer | forward | backward | sum | host ms |\n|---|---|---|---|---|"
        print("\n".join([head, *count()]))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (2, 64) if options.tiny else (8, 2048)
    head = [
        "| arm | step ms [p10, p90] | / LoRA | peak GiB | trained | new adapter = base |",
        "|---|---|---|---|---|---|",
    ]
    lines = rows(options, TINY if options.tiny else SIZES, shape, device)
    table = "\n".join([*head, *lines, "", str(machine(("torch", "transformers", "peft")))])
    print(table)
    if options.out:
        options.out.write_text(table + "\n")


if __name__ == "__main__":
    main()
