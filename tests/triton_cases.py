"""Kernels in tests: on a GPU where there is one, else interpreted (float32 and float64)."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is first imported
