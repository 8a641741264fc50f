"""Muon: an update whose singular values are all near 1."""

import torch
from torch import Tensor

STEPS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def newton_schulz(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Five steps `X <- a X + (b A + c A^2) X`, `A = X X^T`, from `X = G / (||G||_F + 1e-7)`.

    Every matrix `[..., rows, columns]` for itself, transposed if it has more rows than columns.
    Source: Zhang et al. 2025, arXiv:2505.23884, section 3; Jordan et al., "Muon", 2024.

    Args:
        gradient: G.
        dtype: of the steps; the result is in that of G.
    """
    tall = gradient.shape[-2] > gradient.shape[-1]
    x = (gradient.mT if tall else gradient).to(dtype)
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    # In bfloat16 the order of the factors shows: it is the published one.
    for a, b, c in STEPS:
        gram = x @ x.mT
        x = a * x + (b * gram + (c * gram) @ gram) @ x
    return (x.mT if tall else x).to(gradient.dtype)
