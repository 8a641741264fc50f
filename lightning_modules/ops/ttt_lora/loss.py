"""The inner objective of TTT-as-LoRA at given weights, for monitors and tests."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from lightning_modules.ops.ttt_eager import autocast_device
from lightning_modules.ops.ttt_lora.checks import check_norm


def inner_loss(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    b: Tensor,
    *,
    loss: Literal["plain", "ln"] = "plain",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> Tensor:
    """`1/2 || f(k W + b) - (v - k) ||^2` of each token, f the identity or the LayerNorm, `[B, T]`.

    In float32 (float64 if k is), whatever autocast says.

    Args:
        k: keys, `[B, T, d]`, or `[B, T, G, d]` for a group (then the result is `[B, T, G]`).
        v: values, as k.
        w: weight, `[d, d]`, or of each row `[B, d, d]`; with the axis of the group before d, d.
        b: bias, `[d]` or `[B, d]`, likewise.
        loss: as in `ttt_lora`, as are the others.

    Raises:
        ValueError: if the norm does not fit the loss.
    """
    check_norm(loss, norm_weight, norm_bias, tuple(k.shape[2:]))
    dtype, grouped = torch.promote_types(k.dtype, torch.float32), k.dim() == 4
    keys = k.to(dtype)
    target = v.to(dtype) - keys
    with torch.autocast(autocast_device(k.device), enabled=False):
        inputs = keys.transpose(1, 2) if grouped else keys
        z = inputs @ w.to(dtype) + b.to(dtype).unsqueeze(-2)
        z = z.transpose(1, 2) if grouped else z
        if norm_weight is not None and norm_bias is not None:
            normalised = layer_norm(z, z.shape[-1:], eps=norm_eps)
            z = torch.addcmul(norm_bias.to(dtype), norm_weight.to(dtype), normalised)
        return 0.5 * (z - target).square().sum(-1)
