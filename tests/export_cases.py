"""Small modules of every variant, as checkpoints to export."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pi0_cases
import torch
from expert_cases import make_module as make_expert
from export_readings import BY_POLICY
from lact_module_cases import CHUNK, CONFIG, LLAMA, adamw, save_pretrained
from memory_cases import memory_options
from ttt_lora_module_cases import make_module as make_ttt_lora

from lightning_modules import LaCTModule, MemoryBankModule
from lightning_modules.base import AdapterModule
from lightning_modules.models.pretrained import PretrainedOptions
from lightning_modules.models.projection_lora import ProjectionLoRA

FEATURES = {
    "vocab_size": 259,
    "bos_id": 256,
    "eos_id": 257,
    "pad_id": 258,
    "chunk_length": CHUNK,
    "tbptt": 1,
    "mode": "stream",
    "packing_alignment": 1,
    "tokenizer": "bytes",
}
LACT = {"memory": {"num_lact_heads": 2}, "update": {"lact_chunk_size": 8}}
PLAN = [{"pattern": "*", "adapter_type": "lact", "adapter_config": LACT}]

Make = Callable[[Path], AdapterModule]


def base(folder: Path, **options: Any) -> PretrainedOptions:
    """A tiny Qwen3 in a folder."""
    name = folder / "qwen3"
    return PretrainedOptions(str(name) if name.exists() else save_pretrained(folder), **options)


def lact(folder: Path) -> AdapterModule:
    return LaCTModule(adamw, config=CONFIG)


def lact_beside(folder: Path, train: str = "adapters") -> AdapterModule:
    return LaCTModule(adamw, pretrained=base(folder, train=train), adapters=PLAN)


def memory(folder: Path, arm: str, pretrained: bool = False, **options: Any) -> AdapterModule:
    where = {"pretrained": base(folder, **options)} if pretrained else {"config": LLAMA}
    lora = ProjectionLoRA(rank=2)
    return MemoryBankModule(adamw, arm=arm, memory=memory_options("block"), lora=lora, **where)


def ttt_lora(folder: Path, method: str, pretrained: bool = False, **options: Any) -> AdapterModule:
    where = {"pretrained": base(folder, **options)} if pretrained else {}
    return make_ttt_lora(method, **where)


def pi0_pretrained(folder: Path) -> AdapterModule:
    name = folder / "pi0"
    if not name.exists():
        pi0_cases.save_official(name)
    return pi0_cases.make_pi0(pretrained=str(name), train="lora", shake=False)


CASES: dict[str, Make] = {
    "lact": lact,
    "lact_beside": lact_beside,
    "lact_beside_all": partial(lact_beside, train="all"),
    "memory_vanilla": partial(memory, arm="vanilla"),
    "memory": partial(memory, arm="memory"),
    "memory_pretrained": partial(memory, arm="memory", pretrained=True),
    "memory_all": partial(memory, arm="memory", pretrained=True, train="all"),
    "memory_lora": partial(memory, arm="lora", pretrained=True),
    "memory_both": partial(memory, arm="both", pretrained=True),
    "none": partial(ttt_lora, method="none"),
    "ttt_lora": partial(ttt_lora, method="ttt_lora"),
    "in_place": partial(ttt_lora, method="in_place"),
    "both_scratch": partial(ttt_lora, method="ttt_lora+lora"),
    "lora_pretrained": partial(ttt_lora, method="lora", pretrained=True),
    "ttt_lora_pretrained": partial(ttt_lora, method="ttt_lora", pretrained=True),
    "ttt_lora_bfloat16": partial(ttt_lora, method="ttt_lora", pretrained=True, dtype="bfloat16"),
    "in_place_pretrained": partial(ttt_lora, method="in_place", pretrained=True),
    "both_pretrained": partial(ttt_lora, method="ttt_lora+lora", pretrained=True),
    "expert": lambda folder: make_expert(),
    "expert_carried": lambda folder: make_expert(ttt_state="carry_episode"),
    "pi0": lambda folder: pi0_cases.make_pi0(),
    "pi0_pretrained": pi0_pretrained,
}


def trained(name: str, folder: Path) -> AdapterModule:
    """The module of a case, every trained weight away from where it began."""
    module = CASES[name](folder)
    if name not in BY_POLICY:
        torch.manual_seed(3)
        module.build(FEATURES)
    left_out = module.left_out_names()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for own, parameter in module.named_parameters():
            if own not in left_out:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def save(module: AdapterModule, path: Path) -> Path:
    """What Lightning's checkpoint holds of a module."""
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict(), "global_step": 7}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return path
