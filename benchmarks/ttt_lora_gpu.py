"""A training step of a 0.6B language model with TTT-LoRA, In-Place TTT, peft's LoRA, or neither.

    python benchmarks/ttt_lora_gpu.py --out ttt_lora_gpu.md     # on a GPU
    python benchmarks/ttt_lora_gpu.py --modes eager default     # also compiled: minutes for an arm
    python benchmarks/ttt_lora_gpu.py --modes eager graph       # also the GPU's part alone
    python benchmarks/ttt_lora_gpu.py --kernels                 # a step's GPU time by kernel
    python benchmarks/ttt_lora_gpu.py --tiny                    # a few seconds on a CPU
    python benchmarks/ttt_lora_gpu.py --count                   # launches per layer, on a CPU

Qwen3-0.6B's body with random weights in bfloat16, B = 8, T = 2,048, adapters in every linear layer
of attention and MLPs (In-Place TTT: every 4th MLP), parameters of a LoRA of rank 16, mini-batches
of 16 tokens, carried state. Forward, cross entropy and backward; medians with the 10th and 90th
percentile of `--repeats` calls after three warm-up calls, from device events. The loss of the
output layer is in all arms; ratios are to the first row of LoRA. Peak memory is of the whole step.
Before it is timed, a new adapter must compute what the base does, bit for bit.

The mode `graph` records the eager step in a CUDA graph and times how it is replayed: what the GPU
needs when no host is waited for. Every replay then continues the same state of the chunk before,
and the peak is not of the step.

transformers looks at every call whether its tokens are packed: it waits for the GPU there, and
while a graph is recorded it makes a mask for attention in place of an answer. Here it is told that
there is no mask, in all modes.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from launches import per_layer
from op_timing import kernel_times
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
MODES = ("eager", "graph", "default", "reduce-overhead")
"""How the model runs: as it is, recorded in a CUDA graph, or compiled in a mode of torch.compile;
the last records CUDA graphs, too."""
KINDS = {
    "attention": r"flash|fmha|sdpa|attention",
    "Triton kernels of ours": r"^[a-z_0-9]+_kernel$",
    "matrix products": r"gemm|gemv|cutlass|nvjet|splitk|xmma|cublas",
}
"""Kind of a kernel -> what its name has; the first that fits counts, and none is element-wise."""


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


def make_forward(
    model: nn.Module, ids: Tensor, carries: bool, handles: list[FastState] | None = None
) -> Callable[[], Tensor]:
    """The loss of one chunk, with the state of the chunk before, which is the last of `handles`."""
    handles = [FastState()] if handles is None else handles
    trained = [p for p in model.parameters() if p.requires_grad]
    no_mask = {"attention_mask": dict.fromkeys(model.config.layer_types)}

    def forward() -> Tensor:
        for parameter in trained:
            parameter.grad = None
        given = {"fast_state": handles[-1]} if carries else {}
        torch.compiler.cudagraph_mark_step_begin()
        logits = model(input_ids=ids[:, :-1], use_cache=False, **no_mask, **given).logits
        if carries:
            handles[-1] = handles[-1].map(Tensor.detach)
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    return forward


def make_step(
    model: nn.Module, ids: Tensor, carries: bool, handles: list[FastState] | None = None
) -> Callable[[], Tensor]:
    """Forward and backward of one chunk."""
    forward = make_forward(model, ids, carries, handles)

    def step() -> Tensor:
        loss = forward()
        loss.backward()
        return loss.detach()

    return step


class Replayed:
    """Forward and backward of one chunk, recorded in a CUDA graph and replayed when called.

    It is recorded on the stream that it was warmed up on, and the gradients are None then, so that
    they get their memory in the graph's pool. Replays read the state of the chunk before where it
    was: `handles` keeps it, as it keeps the state after the chunk.
    """

    def __init__(self, model: nn.Module, ids: Tensor, carries: bool) -> None:
        self.handles = [FastState()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            warm_up = make_step(model, ids, carries, self.handles)
            for _ in range(3):
                warm_up()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.handles.append(self.handles[-1])
        step = make_step(model, ids, carries, self.handles)
        for parameter in model.parameters():
            parameter.grad = None
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.loss = step()

    def __call__(self) -> Tensor:
        """The loss, where every replay writes it."""
        self.graph.replay()
        return self.loss


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


def arms(
    options: argparse.Namespace, sizes: dict[str, Any], ids: Tensor
) -> Iterator[tuple[str, str, nn.Module, Callable[[], Tensor], str]]:
    """Name, method, model, step and "yes" (a new adapter = base) of every mode and arm.

    Only of arms that --only names, or whose names have a word of it.
    """
    expected = None
    for mode, (name, (method, placement)) in product(options.modes, ARMS.items()):
        if options.only and not any(
            name == word if word in ARMS else word in name for word in options.only
        ):
            continue
        backend = "torch" if name.endswith("torch backend") else "auto"
        layer.ttt_lora_cell = partial(ttt_lora_cell, backend=backend)
        model = make_model(method, placement, sizes, ids.device.type)
        with torch.no_grad():
            logits = model(input_ids=ids[:1, :-1], use_cache=False).logits
        expected = logits if expected is None else expected
        same = "yes" if torch.equal(logits, expected) else "NO"
        del logits
        if mode in MODES[2:]:
            torch._dynamo.reset()
            model.compile(mode=mode)
        make = Replayed if mode == "graph" else make_step
        try:
            step = make(model, ids, method in ("ttt_lora", "in_place"))
        except RuntimeError as error:  # only while a graph is recorded: the others go on
            print(f"| {name}; {mode} | {str(error).splitlines()[0]} |", flush=True)
            continue
        yield name if mode == "eager" else f"{name}; {mode}", method, model, step, same
        del model, step
        if ids.is_cuda:
            torch.cuda.empty_cache()


def rows(options: argparse.Namespace, sizes: dict[str, Any], ids: Tensor) -> list[str]:
    """A line of the table for every mode and arm."""
    lines, lora = [], None
    for name, method, model, step, same in arms(options, sizes, ids):
        times, peak = measure(step, options.repeats, ids.device.type)
        low, *_, high = statistics.quantiles(times, n=10)
        median = statistics.median(times)
        lora = median if method == "lora" and lora is None else lora
        ratio = f"{median / lora:.2f}" if lora else ""
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        cells = f"{median:.1f} [{low:.1f}, {high:.1f}] | {ratio} | {peak:.1f}"
        lines.append(f"| {name} | {cells} | {trained:,} | {same} |")
        print(lines[-1], flush=True)
        del model, step
    return lines


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name: one of `KINDS`, or other element-wise work."""
    found = (kind for kind, names in KINDS.items() if re.search(names, kernel, re.IGNORECASE))
    return next(found, "other element-wise")


def kernels(name: str, times: Sequence[tuple[str, float, int]], longest: int = 25) -> list[str]:
    """Lines on the GPU time of a step: sums by kind, and the longest kernels.

    Args:
        name: of the arm.
        times: name, milliseconds and launches of each kernel, the longest first.
        longest: how many to list.
    """
    sums = {kind: (0.0, 0) for kind in (*KINDS, "other element-wise")}
    for kernel, time_, launches in times:
        total, count = sums[kind_of(kernel)]
        sums[kind_of(kernel)] = (total + time_, count + launches)
    whole = sum(total for total, _ in sums.values())
    lines = [f"## {name}: {whole:.1f} ms", "", "| kernel | ms | launches |", "|---|---|---|"]
    lines += [f"| **{kind}** | {total:.2f} | {count} |" for kind, (total, count) in sums.items()]
    cut = [(kernel.replace("|", "/")[:90], *rest) for kernel, *rest in times[:longest]]
    return [*lines, *(f"| {kernel} | {time_:.2f} | {n} |" for kernel, time_, n in cut), ""]


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
    parser.add_argument("--kernels", action="store_true", help="GPU time by kernel, no timing")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--only", nargs="*", default=[], help="names of arms to run, or words in them"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["eager"])
    parser.add_argument("--out", type=Path, help="file to write")
    options = parser.parse_args()
    if options.count:
        head = "| per layer | forward | backward | sum | host ms |\n|---|---|---|---|---|"
        print("\n".join([head, *count()]))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and (options.kernels or "graph" in options.modes):
        parser.error("--kernels and --modes graph need a GPU, and torch finds none")
    sizes, shape = (TINY, (2, 65)) if options.tiny else (SIZES, (8, 2049))
    ids = torch.randint(0, sizes["vocab_size"], shape, device=device)
    head = [
        "| arm | step ms [p10, p90] | / LoRA | peak GiB | trained | new adapter = base |",
        "|---|---|---|---|---|---|",
    ]
    if options.kernels:
        head, lines = [], []
        for name, _, _, step, _ in arms(options, sizes, ids):
            lines += kernels(name, kernel_times(step))
            del step
    else:
        lines = rows(options, sizes, ids)
    table = "\n".join([*head, *lines, "", str(machine(("torch", "transformers", "peft")))])
    print(table)
    if options.out:
        options.out.write_text(table + "\n")


if __name__ == "__main__":
    main()
