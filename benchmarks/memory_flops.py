"""FLOPs of a forward pass per token, counted where PyTorch dispatches them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_modules.adapters import as_config
from lightning_modules.memory_bank import MemoryBankModule
from lightning_modules.models.memory_options import MemoryOptions


def flops_per_token(config: Mapping[str, Any], vocab_size: int) -> float:
    """Matrix products of one batch, by its tokens: a bank that is projected once counts once.

    Args:
        config: of a run with a MemoryBankModule from scratch.
        vocab_size: of its data.
    """
    options, data = config["model"]["init_args"], config["data"]["init_args"]
    memory = as_config(MemoryOptions, options["memory"], "memory")
    module = MemoryBankModule(
        torch.optim.AdamW, arm=options["arm"], config=options["config"], memory=memory
    )
    length = data["chunk_length"]
    module.build({"vocab_size": vocab_size, "chunk_length": length, "tbptt": 1, "mode": "packed"})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = torch.zeros(data["batch_size"], length, dtype=torch.int64, device=device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module.to(device).eval().model(
            ids, use_cache=False, document_alignment=data["packing_alignment"]
        )
    return counter.get_total_flops() / ids.numel()
