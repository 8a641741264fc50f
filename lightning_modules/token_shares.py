"""The part of a chunk that a process reads, where a group of processes shares the rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_modules.ops.processes import own_part

PER_TOKEN = ("input_ids", "labels", "mask", "document_ids")


def own_chunk(chunk: dict[str, Any], position: Tensor, group: ProcessGroup) -> dict[str, Any]:
    """The own part of a chunk that every process of the group has read whole.

    Labels were shifted before, so that the last token of a part has its label.

    Args:
        chunk: batch-contract dict.
        position: of every token in its file or document, `[B, T]`.
        group: the processes.

    Returns:
        The chunk with the own tokens, `position` of them, and `place`, by which attention turns
        them: the position in the document, or in the chunk.

    Raises:
        ValueError: the tokens cannot be divided among the processes.
    """
    length = chunk["input_ids"].shape[1]
    if length % group.size():
        raise ValueError(
            f"chunks of {length} tokens cannot be shared by {group.size()} processes: make the "
            "DataModule's chunk_length a multiple of that"
        )
    own = own_part(length // group.size(), group)
    place = position
    if "document_ids" not in chunk:
        place = torch.arange(length, device=position.device).expand_as(position)
    parts = {name: chunk[name][:, own] for name in PER_TOKEN if name in chunk}
    return {**chunk, **parts, "position": position[:, own], "place": place[:, own]}
