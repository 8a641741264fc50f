"""How a flow-matching model sees its time: features, condition vector, action tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_PERIOD = 4e-3
MAX_PERIOD = 4.0


def sincos_embedding(
    t: Tensor, width: int, min_period: float = MIN_PERIOD, max_period: float = MAX_PERIOD
) -> Tensor:
    """Sines, then cosines of t at log-spaced periods.

    `period_i = min_period (max_period / min_period)^(i / (width/2 - 1))`,
    `out = [sin(2 pi t / period), cos(2 pi t / period)]`.

    Args:
        t: times, any shape `[...]`.
        width: number of features, even.
        min_period: shortest period, in units of t.
        max_period: longest period.

    Returns:
        `[..., width]`, float32 (float64 for float64 t).

    Raises:
        ValueError: odd width.
    """
    if width % 2:
        raise ValueError(f"width={width} must be even: half sines, half cosines")
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=t.device)
    frequency = 2 * math.pi / (min_period * (max_period / min_period) ** fraction)
    dtype = torch.promote_types(t.dtype, torch.float32)
    phase = t.to(dtype).unsqueeze(-1) * frequency.to(dtype)
    return torch.cat([phase.sin(), phase.cos()], dim=-1)


class TimeMLP(nn.Module):
    """Condition vector of pi0.5: `silu(W_out silu(W_in sincos(t) + b_in) + b_out)`.

    Args:
        width: size of the condition vector, even.
        min_period: shortest period of the time features.
        max_period: longest period.
    """

    def __init__(
        self, width: int, min_period: float = MIN_PERIOD, max_period: float = MAX_PERIOD
    ) -> None:
        super().__init__()
        self.width, self.min_period, self.max_period = width, min_period, max_period
        self.time_mlp_in = nn.Linear(width, width)
        self.time_mlp_out = nn.Linear(width, width)

    def reset_parameters(self) -> None:
        """Draw both maps as `nn.Linear` does."""
        self.time_mlp_in.reset_parameters()
        self.time_mlp_out.reset_parameters()

    def forward(self, t: Tensor) -> Tensor:
        """Condition `[B, width]` for times t `[B]`."""
        features = sincos_embedding(t, self.width, self.min_period, self.max_period)
        features = features.to(self.time_mlp_in.weight.dtype)
        return F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(features))))


class ActionTimeEmbedding(nn.Module):
    """Tokens of pi0: one for the robot state, one per noisy action with the time mixed in.

    `action_time_mlp_out(silu(action_time_mlp_in([action_in_proj(a), sincos(t)])))`.

    Args:
        state_size: size S of the robot state.
        action_size: size A of an action.
        width: size of a token, even.
        min_period: shortest period of the time features.
        max_period: longest period.
    """

    def __init__(
        self,
        state_size: int,
        action_size: int,
        width: int,
        min_period: float = MIN_PERIOD,
        max_period: float = MAX_PERIOD,
    ) -> None:
        super().__init__()
        self.width, self.min_period, self.max_period = width, min_period, max_period
        self.state_proj = nn.Linear(state_size, width)
        self.action_in_proj = nn.Linear(action_size, width)
        self.action_time_mlp_in = nn.Linear(2 * width, width)
        self.action_time_mlp_out = nn.Linear(width, width)

    def reset_parameters(self) -> None:
        """Draw the four maps as `nn.Linear` does."""
        for module in self.children():
            module.reset_parameters()

    def forward(self, state: Tensor, noisy_actions: Tensor, t: Tensor) -> Tensor:
        """Tokens `[B, 1 + N, width]` from state `[B, S]`, actions `[B, N, A]`, times `[B]`."""
        actions = self.action_in_proj(noisy_actions)
        time = sincos_embedding(t, self.width, self.min_period, self.max_period)
        time = time.to(actions.dtype).unsqueeze(1).expand_as(actions)
        mixed = F.silu(self.action_time_mlp_in(torch.cat([actions, time], dim=-1)))
        return torch.cat(
            [self.state_proj(state).unsqueeze(1), self.action_time_mlp_out(mixed)], dim=1
        )
