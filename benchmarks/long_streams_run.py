"""One run of `long_streams.py`, in a process of its own: read a long stream, measure on the way.

    python long_streams_run.py '{"variant": "lact", "mode": "inference", "total": 65536, ...}'

prints what it measured as a line of JSON.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor
from transformers import DynamicCache

from datamodules.corpora import open_corpus
from datamodules.documents import Document, TextSource
from lightning_modules import (
    ActionExpertModule,
    LaCTModule,
    MemoryBankModule,
    TTTLoRAModule,
)
from lightning_modules.adapters import TTTAdapterConfig, as_config
from lightning_modules.base import AdapterModule
from lightning_modules.generation import FastStateCache
from lightning_modules.layers.in_place_mlp import InPlaceConfig
from lightning_modules.layers.ttt import TTTConfig
from lightning_modules.layers.ttt_lora import TTTLoRAOptions
from lightning_modules.models.action_expert import ExpertConfig
from lightning_modules.models.in_place import InPlaceOptions
from lightning_modules.models.memory_options import MemoryOptions
from lightning_modules.models.ttt_lora import TTTLoRAPlacement
from lightning_modules.streams import Slots, StreamPlan

VOCABULARY, PIECE, OTHER_PIECES = 256, 1024, (1000, 1, 700, 347)
"""Bytes; tokens of a call; those of the calls of the second pass, over and over."""

OTHER_STEPS = (2, 3, 1)
"""Calls of the action expert in a step of the second pass: a call itself cannot be split."""

LEARNS = 512
"""Tokens of a chunk of LaCT and of In-Place, and of the window of attention."""

BASE = {
    "model_type": "mistral",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": LEARNS,
}
LACT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attn_heads": 4,
    "num_lact_heads": 2,
    "intermediate_size": 128,
    "window_size": LEARNS,
    "lact_chunk_size": LEARNS,
    "base_lr": 0.1,
}
MEMORY = {
    "bank": {"num_rows": 256},
    "attention": {"num_heads": 2},
    "router": {"num_chapters": 16, "top_k": 2, "strategy": "block", "block_size": 64},
}
STATE, ACTION, HORIZON = 5, 3, 8
EXPERT = {
    "state_dim": STATE,
    "action_dim": ACTION,
    "horizon": HORIZON,
    "stride": HORIZON,
    "image_keys": [],
    "delta_actions": (),
    "action_range": None,
    "action_bounds": None,
}


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """Small steps: the stream is what is measured, not what is learned from it."""
    return torch.optim.AdamW(parameters, lr=1e-4)


def lact() -> AdapterModule:
    """LaCT from scratch."""
    return LaCTModule(adamw, config=LACT)


def ttt_lora() -> AdapterModule:
    """TTT-LoRA in all linear layers."""
    placement = TTTLoRAPlacement(inner_dim=8, learner=TTTLoRAOptions(mini_batch_size=64))
    return TTTLoRAModule(adamw, "ttt_lora", config=BASE, ttt_lora=placement)


def in_place() -> AdapterModule:
    """In-Place TTT in all MLPs."""
    options = InPlaceOptions(every_n=1, layer=InPlaceConfig(chunk_size=LEARNS))
    return TTTLoRAModule(adamw, "in_place", config=BASE, in_place=options)


def memory_bank() -> AdapterModule:
    """A memory bank in all layers, chapters chosen block by block."""
    memory = as_config(MemoryOptions, {"memory": MEMORY}, "memory")
    return MemoryBankModule(adamw, config=BASE, memory=memory)


def action_expert() -> AdapterModule:
    """The action expert, its state carried through one endless episode."""
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "head_dim": 16}
    return ActionExpertModule(
        adamw,
        expert=ExpertConfig(**sizes, intermediate_size=64),
        ttt=TTTAdapterConfig(layer=TTTConfig(num_heads=2)),
        ttt_state="carry_episode",
        execution_horizon=HORIZON,
        denoise_steps=4,
        normalization="none",
    )


VARIANTS: dict[str, Callable[[], AdapterModule]] = {
    "lact": lact,
    "ttt_lora": ttt_lora,
    "in_place": in_place,
    "memory_bank": memory_bank,
    "action_expert": action_expert,
}


def build(variant: str, seed: int) -> AdapterModule:
    """The module, every weight moved a little: none is at a zero that would hide its branch."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = VARIANTS[variant]()
        sizes = {"vocab_size": VOCABULARY, "chunk_length": PIECE, "tbptt": 1, "mode": "stream"}
        module.build(EXPERT if variant == "action_expert" else sizes)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return module


def real_text(length: int) -> Tensor:
    """The first bytes of Python's standard library, its files one after the other, `[1, length]`.

    Raises:
        SystemExit: the library is shorter.
    """
    text = b""
    for document in open_corpus(TextSource("stdlib")):
        text += document.content if isinstance(document, Document) else b""
        if len(text) >= length:
            return torch.frombuffer(bytearray(text[:length]), dtype=torch.uint8).long()[None]
    raise SystemExit(f"the standard library has {len(text)} bytes, not {length}: ask for fewer")


def frames(index: int) -> dict[str, Tensor]:
    """What the action expert sees and does at one call: drawn, as there is no such recording."""
    generator = torch.Generator().manual_seed(index)
    return {
        "observation.state": torch.randn(1, STATE, generator=generator),
        "action": torch.randn(1, HORIZON, ACTION, generator=generator),
        "action_is_pad": torch.zeros(1, HORIZON, dtype=torch.bool),
    }


def numbered(chunk: dict[str, Any], index: int) -> dict[str, Any]:
    """The chunk with its place in the stream."""
    plan = StreamPlan((0,), (index,), (index == 0,))
    place = {name: torch.tensor(getattr(plan, name)) for name in StreamPlan._fields}
    return {**chunk, **place, "plan": plan}


class Reader:
    """Reads the stream piece by piece, and holds what it carries.

    Args:
        module: built.
        total: tokens of the stream (calls of the action expert).
    """

    def __init__(self, module: AdapterModule, total: int) -> None:
        self.module, self.total = module, total

    def read(self, start: int, length: int) -> None:
        """The next `length` tokens, which begin at `start`."""
        raise NotImplementedError

    def carried(self) -> Slots:
        """The fast state."""
        return self.module.streams.slots("train")

    def kept(self) -> int:
        """Bytes of all that is carried to the next piece."""
        return size_of(self.carried())


class TextInference(Reader):
    """A language model that reads with a cache, as in `generate()`."""

    def __init__(self, module: AdapterModule, total: int) -> None:
        super().__init__(module.eval(), total)
        self.text, self.cache = real_text(total), FastStateCache(module.model.config)

    @torch.no_grad()
    def read(self, start: int, length: int) -> None:
        ids = self.text[:, start : start + length]
        self.module.model(input_ids=ids, past_key_values=self.cache, logits_to_keep=1)

    def carried(self) -> Slots:
        return self.cache.slots

    def kept(self) -> int:
        return size_of(self.carried()) + size_of_keys(self.cache)


class Training(Reader):
    """Steps of the optimizer, one piece each (tbptt 1), through the module's streams."""

    def __init__(self, module: AdapterModule, total: int) -> None:
        super().__init__(module.train(), total)
        self.optimizer = adamw(module.parameters())
        self.index = 0

    def chunk(self, start: int, length: int) -> dict[str, Any]:
        """The next piece as the DataModules give it."""
        return numbered(frames(start), self.index)

    def read(self, start: int, length: int) -> None:
        streams = self.module.streams
        streams.begin_step("train")
        chunk = self.chunk(start, length)
        self.optimizer.zero_grad()
        self.module.chunk_loss(chunk, streams.begin(chunk), None).backward()
        streams.commit()
        self.optimizer.step()
        self.index += 1


class TextTraining(Training):
    """Training on text."""

    def __init__(self, module: AdapterModule, total: int) -> None:
        super().__init__(module, total)
        self.text = real_text(total + 1)

    def chunk(self, start: int, length: int) -> dict[str, Any]:
        ids = self.text[:, start : start + length + 1]
        return numbered({"input_ids": ids[:, :-1], "labels": ids[:, 1:]}, self.index)


class FrameInference(Reader):
    """The action expert in an episode: it samples `length` chunks of actions before it commits."""

    @torch.no_grad()
    def read(self, start: int, length: int) -> None:
        streams = self.module.streams
        streams.begin_step("train")
        for index in range(start, start + length):
            chunk = numbered(frames(index), index)
            generator = torch.Generator().manual_seed(index)
            self.module.sample_actions(chunk, streams.begin(chunk), generator)
        streams.commit()


READERS: dict[tuple[bool, str], type[Reader]] = {
    (True, "inference"): FrameInference,
    (True, "training"): Training,
    (False, "inference"): TextInference,
    (False, "training"): TextTraining,
}


def size_of(slots: Slots) -> int:
    """Bytes of all tensors."""
    return sum(x.nbytes for fields in slots.values() for x in fields.values())


def size_of_keys(cache: DynamicCache) -> int:
    """Bytes of the window of keys and values of a model that keeps one."""
    layers = [layer for layer in cache.layers if layer.is_initialized]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


def pieces(total: int, sizes: Iterator[int]) -> Iterator[tuple[int, int]]:
    """Start and length of each piece; the last one ends at `total`."""
    start = 0
    while start < total:
        length = min(next(sizes), total - start)
        yield start, length
        start += length


def resident() -> tuple[int, int]:
    """Bytes of main memory that the process has now, and the most it has had."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * os.sysconf("SC_PAGE_SIZE"), peak


def measure(reader: Reader, piece: int) -> dict[str, Any]:
    """Read all of it; CPU time of the quarters, memory after a sixteenth and at the end."""
    marks, memory, sizes = [], [], []
    quarter, warm = reader.total / 4, reader.total / 16
    began = time.process_time()
    for start, length in pieces(reader.total, cycle([piece])):
        reader.read(start, length)
        done = start + length
        if done >= warm and not memory:
            memory.append(resident())
            sizes.append(reader.kept())
        while done >= quarter * (len(marks) + 1):
            marks.append(time.process_time() - began)
    memory.append(resident())
    sizes.append(reader.kept())
    seconds = [b - a for a, b in zip([0.0, *marks], marks, strict=False)]
    return {
        "speed": [quarter / s for s in seconds],
        "resident": [now for now, _ in memory],
        "peak": [most for _, most in memory],
        "state": sizes,
    }


def difference(one: Slots, other: Slots) -> float:
    """Largest `max |a - b| / max |a|` of a tensor; infinite if integers differ."""
    worst = 0.0
    for slot, fields in one.items():
        for name, value in fields.items():
            if not value.numel():
                continue
            apart = (value.double() - other[slot][name].double()).abs().max().item()
            if not value.is_floating_point() and apart:
                return float("inf")
            worst = max(worst, apart / max(value.double().abs().max().item(), 1e-30))
    return worst


def run(
    variant: str, mode: str, total: int, seed: int, dtype: str = "float32", again: bool = False
) -> dict[str, Any]:
    """What one run measures.

    Args:
        variant: one of `VARIANTS`.
        mode: `inference` or `training`.
        total: tokens, or calls of the action expert.
        seed: of the weights.
        dtype: of weights and state.
        again: read all of it a second time in pieces of other sizes, and compare the states.
    """
    torch.set_num_threads(1)
    acts = variant == "action_expert"
    piece, other = (1, OTHER_STEPS) if acts else (PIECE, OTHER_PIECES)

    def make() -> Reader:
        return READERS[acts, mode](build(variant, seed).to(getattr(torch, dtype)), total)

    reader = make()
    result = measure(reader, piece)
    if again:
        second = make()
        for start, length in pieces(total, cycle(other)):
            second.read(start, length)
        result["difference"] = difference(reader.carried(), second.carried())
    return result


if __name__ == "__main__":
    print(json.dumps(run(**json.loads(sys.argv[1]))))
