"""What the monitors cost, and whether a training step ever waits for the GPU.

    python benchmarks/monitors.py --out monitors.md     # on a GPU
    python benchmarks/monitors.py --tiny                # a minute on a CPU

Every variant is trained by Lightning's Trainer with a TensorBoard logger, on the standard library
as bytes (the action expert: on random episodes in the LeRobot format), with and without all
monitors at their default intervals, in turn, `--repeats` times. After 110
steps, which hold a flush (what is made and loaded once is no cost of a step), the clock runs for
`--steps` steps, with the device synchronised before and behind: flushes and what they write are
inside, validation is not. On a GPU every variant is then trained once more, looked at in every
step, with CUDA raising an error wherever a step between two flushes waits for it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from training_runs import machine

from callbacks import (
    FastWeightMonitor,
    FileBoundaryReset,
    GateMonitor,
    PositionLossMonitor,
    RouterMonitor,
    StreamStateCheckpoint,
    Throughput,
)
from datamodules import ActionChunkDataModule, TextStreamDataModule
from datamodules.lerobot_writer import LeRobotWriter
from lightning_modules import ActionExpertModule, LaCTModule, MemoryBankModule, TTTLoRAModule
from lightning_modules.adapters import TTTAdapterConfig, as_config
from lightning_modules.base import AdapterModule
from lightning_modules.layers.ttt import TTTConfig
from lightning_modules.layers.ttt_lora import TTTLoRAOptions
from lightning_modules.models.action_expert import ExpertConfig
from lightning_modules.models.memory_options import MemoryOptions
from lightning_modules.models.ttt_lora import TTTLoRAPlacement

WARM_UP = 110
FLUSH = 10
"""Steps from flush to flush where CUDA watches: nine in ten must not wait."""

ADAMW = partial(torch.optim.AdamW, lr=1e-4)


@dataclass(frozen=True)
class Sizes:
    """How large the models and batches are.

    Args:
        expert: of the action expert, with `heads` heads of TTT.
        heads: of TTT.
        lact: configuration of LaCT.
        llama: of the model with a memory bank in two of its layers, and `memory` its options.
        memory: layers and bank.
        qwen: of the model with TTT-LoRA.
        rows: of a batch of chunks of actions.
        tokens: rows and tokens of a batch of text.
        episodes: number and frames of the random episodes.
    """

    expert: ExpertConfig
    heads: int
    lact: dict[str, Any]
    llama: dict[str, Any]
    memory: dict[str, Any]
    qwen: dict[str, Any]
    rows: int
    tokens: tuple[int, int]
    episodes: tuple[int, int]


def _decoder(kind: str, hidden: int, layers: int, heads: int, kv: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    heads_ = {"num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": hidden // heads}
    return {"model_type": kind, "max_position_embeddings": 2048, **sizes, **heads_}


def _memory(layers: list[int], rows: int, heads: int, router: dict[str, Any]) -> dict[str, Any]:
    bank = {"bank": {"num_rows": rows}, "attention": {"num_heads": heads}, "router": router}
    return {"placement": "custom", "layers": layers, "memory": bank}


FULL = Sizes(
    ExpertConfig(1024, 18, 8, 1, 256, 4096),
    heads=8,
    lact={
        "hidden_size": 1024,
        "num_hidden_layers": 12,
        "num_attn_heads": 16,
        "num_lact_heads": 4,
        "window_size": 512,
        "lact_chunk_size": 512,
    },
    llama=_decoder("llama", 768, 16, 12, 4),
    memory=_memory(
        [2, 6, 10, 14], 4160, 12, {"strategy": "block", "num_chapters": 65, "top_k": 8, "shared": 1}
    ),
    qwen=_decoder("qwen3", 1024, 4, 16, 8),
    rows=64,
    tokens=(8, 1024),
    episodes=(700, 400),
)

TINY = Sizes(
    ExpertConfig(32, 2, 4, 1, 8, 64),
    heads=4,
    lact={
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attn_heads": 4,
        "num_lact_heads": 2,
        "window_size": 16,
        "lact_chunk_size": 16,
    },
    llama=_decoder("llama", 32, 2, 4, 2),
    memory=_memory([1], 32, 2, {"strategy": "block", "num_chapters": 4, "top_k": 2}),
    qwen=_decoder("qwen3", 32, 2, 4, 2),
    rows=4,
    tokens=(2, 64),
    episodes=(8, 150),
)


def action_expert(size: Sizes) -> AdapterModule:
    """The expert of 300M parameters with TTT in all layers, whose state is carried."""
    layer = TTTConfig(kind="linear", num_heads=size.heads)
    return ActionExpertModule(
        ADAMW,
        expert=size.expert,
        ttt=TTTAdapterConfig(layer=layer),
        ttt_state="carry_episode",
        execution_horizon=50,
    )


def lact(size: Sizes) -> AdapterModule:
    """Stacked LaCT, r = 2."""
    return LaCTModule(ADAMW, config={**size.lact, "r": 2})


def memory_bank(size: Sizes) -> AdapterModule:
    """A bank in some layers, routed block by block."""
    memory = as_config(MemoryOptions, size.memory, "memory")
    return MemoryBankModule(ADAMW, config=size.llama, memory=memory)


def ttt_lora(size: Sizes) -> AdapterModule:
    """TTT-LoRA on all linear layers, of the parameters of a LoRA of rank 16."""
    learner = TTTLoRAOptions(mini_batch_size=16)
    return TTTLoRAModule(ADAMW, config=size.qwen, ttt_lora=TTTLoRAPlacement(learner=learner))


VARIANTS: dict[str, Callable[[Sizes], AdapterModule]] = {
    "action expert": action_expert,
    "LaCT": lact,
    "memory bank": memory_bank,
    "TTT-LoRA": ttt_lora,
}


def make_data(name: str, size: Sizes, folder: Path) -> pl.LightningDataModule:
    """Streams of the variant's kind."""
    if name != "action expert":
        rows, tokens = size.tokens
        return TextStreamDataModule(
            cache=str(folder / "tokens"),
            batch_size=rows,
            chunk_length=tokens,
            min_tokens=4 * tokens,
        )
    episodes, frames = size.episodes
    root = folder / "episodes"
    if not root.exists():
        write_episodes(root, episodes, frames)
    return ActionChunkDataModule(str(root), horizon=50, stride=50, batch_size=size.rows)


def write_episodes(root: Path, episodes: int, frames: int) -> None:
    """Random episodes with 32 numbers of state and of action."""
    rng = np.random.default_rng(0)
    names = ("observation.state", "action")
    features = {name: {"dtype": "float32", "shape": [32], "names": None} for name in names}
    with LeRobotWriter(root, fps=50, features=features) as writer:
        for _ in range(episodes):
            draw = {name: rng.normal(size=(frames, 32)).astype(np.float32) for name in names}
            writer.add_episode(draw, "move")


class Clock(pl.Callback):
    """Milliseconds per step behind the warm-up."""

    def __init__(self, warm_up: int, steps: int) -> None:
        self.warm_up, self.steps, self.began, self.milliseconds = warm_up, steps, 0.0, 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step in (self.warm_up, self.warm_up + self.steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now = time.perf_counter()
            self.milliseconds, self.began = 1e3 * (now - self.began) / self.steps, now


class NoWaiting(pl.Callback):
    """CUDA raises an error where a step waits for it that is not the first and does not flush."""

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        step = trainer.global_step + 1
        torch.cuda.set_sync_debug_mode("error" if step > 1 and step % FLUSH else "default")

    def on_train_end(self, *args: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


def monitors(every: int = 100, observe: int = 20) -> list[pl.Callback]:
    """All of them."""
    return [
        GateMonitor(every, observe),
        FastWeightMonitor(every, observe),
        RouterMonitor(every, observe),
        PositionLossMonitor(),
        Throughput(every),
    ]


def run(
    name: str, size: Sizes, folder: Path, steps: int, callbacks: Sequence[pl.Callback]
) -> pl.Trainer:
    """Train for some steps, without validation."""
    torch.manual_seed(0)
    trainer = pl.Trainer(
        accelerator="auto",
        devices=1,
        precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
        max_steps=steps,
        max_epochs=-1,
        logger=TensorBoardLogger(folder, name="runs"),
        log_every_n_steps=100,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[FileBoundaryReset(), StreamStateCheckpoint(), *callbacks],
    )
    trainer.fit(VARIANTS[name](size), make_data(name, size, folder))
    return trainer


def measure(name: str, size: Sizes, folder: Path, options: argparse.Namespace) -> str:
    """A line of the table."""
    warm_up, steps = options.warm_up, options.steps
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(options.repeats):
        for watched in times:
            clock = Clock(warm_up, steps)
            watching = monitors() if watched else []
            run(name, size, folder, warm_up + steps, [*watching, clock])
            times[watched].append(clock.milliseconds)
    cost = [100 * (on / off - 1) for off, on in zip(times[False], times[True], strict=True)]
    cells = [f"{statistics.median(t):.2f} [{min(t):.2f}, {max(t):.2f}]" for t in times.values()]
    overhead = f"{statistics.median(cost):+.2f} [{min(cost):+.2f}, {max(cost):+.2f}]"
    return f"| {name} | {' | '.join(cells)} | {overhead} | {waits(name, size, folder, steps)} |"


def waits(name: str, size: Sizes, folder: Path, steps: int) -> str:
    """How many steps in a row CUDA has watched, or what waited."""
    if not torch.cuda.is_available():
        return ""
    try:
        run(name, size, folder, steps, [NoWaiting(), *monitors(FLUSH, 1)])
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return f"none in {steps - steps // FLUSH - 1} steps"


def main() -> None:
    """Print a table, and write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--warm-up", type=int, default=WARM_UP, help="steps before the clock runs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--out", type=Path, help="file to write")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning, module="lightning|lightning_modules")
    lines = [
        "| variant | ms per step | with all monitors | overhead % | waits between flushes |",
        "|---|---|---|---|---|",
    ]
    print(*lines, sep="\n")
    for name in options.variants:
        with tempfile.TemporaryDirectory() as folder:
            size = TINY if options.tiny else FULL
            line = measure(name, size, Path(folder), options)
        lines.append(line)
        print(line, flush=True)
    packages = ("torch", "lightning", "transformers", "torchmetrics")
    lines += ["", f"Medians of {options.repeats} [least, largest]. {machine(packages)}"]
    print(lines[-1])
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
