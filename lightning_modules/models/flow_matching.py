"""Flow matching as in pi0: t = 1 is noise, t = 0 is data (pure functions)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_modules.layers.time_embedding import sincos_embedding

__all__ = [
    "euler_sample",
    "flow_matching_loss",
    "interpolate",
    "sample_time",
    "sincos_embedding",
    "time_quantile",
]

BETA_ALPHA = 1.5
TIME_OFFSET = 0.001
TIME_SCALE = 0.999


def time_quantile(p: Tensor) -> Tensor:
    """Time below which a draw falls with probability p.

    `t = 0.001 + 0.999 X`, `X ~ Beta(1.5, 1)`, whose distribution function is `x^1.5`: the quantile
    is `0.001 + 0.999 p^(1/1.5)`. p and the result have the same shape; p in [0, 1].
    """
    return TIME_OFFSET + TIME_SCALE * p ** (1.0 / BETA_ALPHA)


def sample_time(
    shape: Sequence[int],
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Training times `0.001 + 0.999 Beta(1.5, 1)`, which favour noise (t near 1).

    Drawn by inverting the distribution function, so that a generator can be given.

    Args:
        shape: shape of the result, usually `[B]`.
        generator: source of randomness on `device`; None uses the global one.
        device: where the result lives.

    Returns:
        float32 times in [0.001, 1).
    """
    return time_quantile(torch.rand(tuple(shape), generator=generator, device=device))


def interpolate(actions: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Point on the straight path and its velocity: `x_t = t noise + (1-t) a`, `u = noise - a`.

    Args:
        actions: data a, `[B, N, A]`.
        noise: `[B, N, A]`.
        t: times `[B]`.

    Returns:
        `x_t` and the target `u`, both `[B, N, A]`.
    """
    t = t.to(actions.dtype).view(-1, *[1] * (actions.dim() - 1))
    return t * noise + (1 - t) * actions, noise - actions


def flow_matching_loss(
    velocity: Tensor,
    target: Tensor,
    action_is_pad: Tensor | None = None,
    real_dims: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean squared error over the valid entries only.

    Args:
        velocity: prediction `[B, N, A]`.
        target: `noise - actions`, `[B, N, A]`.
        action_is_pad: padded steps, bool `[B, N]`; None: no step is.
        real_dims: number of leading action dimensions that are not padding; None: all.

    Returns:
        The mean over the batch (scalar), and per sample `[B]`; 0 where nothing is valid. At least
        float32. Whatever stands in invalid entries has no influence, NaN included.
    """
    dtype = torch.promote_types(velocity.dtype, torch.float32)
    valid = torch.ones_like(velocity, dtype=torch.bool)
    if action_is_pad is not None:
        valid = valid & ~action_is_pad.unsqueeze(-1)
    if real_dims is not None:
        valid = valid & (torch.arange(velocity.shape[-1], device=velocity.device) < real_dims)
    error = torch.where(valid, velocity.to(dtype) - target.to(dtype), 0.0).square()
    total, count = error.sum((1, 2)), valid.sum((1, 2))
    return total.sum() / count.sum().clamp(min=1), total / count.clamp(min=1)


def euler_sample(
    velocity_fn: Callable[[Tensor, Tensor], Tensor], noise: Tensor, num_steps: int = 10
) -> Tensor:
    """Integrate from noise (t = 1) to data (t = 0): `x <- x + dt v(x, t_i)`, `dt = -1/n`.

    Args:
        velocity_fn: `(x [B, N, A], t [B]) -> velocity [B, N, A]`; the i-th call gets
            `t_i = 1 + i dt`.
        noise: where to start, `[B, N, A]`.
        num_steps: n.

    Returns:
        `[B, N, A]` in the dtype of the noise.

    Raises:
        ValueError: no step.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1")
    x, dt = noise, -1.0 / num_steps
    time_dtype = torch.promote_types(x.dtype, torch.float32)
    for step in range(num_steps):
        t = torch.full((x.shape[0],), 1.0 + step * dt, dtype=time_dtype, device=x.device)
        x = x + dt * velocity_fn(x, t).to(x.dtype)
    return x
