"""Pretrained weights that checkpoints leave out, and how a checkpoint knows them again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

SAMPLES = 64
"""Values that the fingerprint takes of every tensor."""


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Short hash of names, shapes and some values, spread out, of named tensors.

    The values are rounded to bfloat16: weights have one fingerprint, whether they were loaded in
    float32 or in bfloat16.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        stride = max(1, tensor.numel() // SAMPLES)
        values = tensor.detach().flatten()[::stride].to(torch.bfloat16).cpu().tolist()
        digest.update(f"{name} {tuple(tensor.shape)} {values}".encode())
    return digest.hexdigest()[:16]
