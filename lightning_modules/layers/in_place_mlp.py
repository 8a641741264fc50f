"""In-Place TTT: a gated MLP whose down projection learns while it reads (arXiv:2604.06169)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lightning_modules.layers.chunk_conv import ChunkConv
from lightning_modules.layers.deep_context import DeepContext, InDeepContext
from lightning_modules.layers.in_place_stream import (
    InPlaceMLPState,
    Reading,
    StreamPlan,
    convolve,
    hold,
    plan_stream,
    resume,
    writes,
)
from lightning_modules.layers.shared_stream import fresh_state, part_of, share_stream
from lightning_modules.ops import in_place

if TYPE_CHECKING:
    from lightning_modules.streams import FastState

PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")
"""What a gated MLP of a Hugging Face decoder is made of."""


@dataclass(frozen=True)
class InPlaceConfig:
    """How the down projection learns.

    Args:
        chunk_size: tokens that are read with the same weight and then write into it together.
        eta: step size. The convolution starts at zero, so that it scales the first gradients.
        kernel_size: taps of the convolution over targets.
        symmetric: let the convolution see later tokens of the chunk, as the release has it.
            Outputs stay causal, as a chunk is written after it has been read.
        projection: project the convolved targets, with as many weights as hidden sizes squared.
        clip: largest Frobenius norm of what a chunk adds to the weight, by that of the weight;
            None: no bound, and as nothing decays, an `eta` or a learning rate that is a little too
            large makes the weight useless in a few steps.
    """

    chunk_size: int = 512
    eta: float = 1.0
    kernel_size: int = 5
    symmetric: bool = False
    projection: bool = True
    clip: float | None = 1e-4

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size={self.chunk_size} must be at least 1")
        if self.eta <= 0:
            raise ValueError(
                f"eta={self.eta} must be positive: without writing, the layer is the MLP it wraps"
            )
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip={self.clip} must be positive; None does not clip")


class InPlaceTargets(nn.Module):
    """All that In-Place TTT trains beside the MLP: `V = Conv1D(target) W_target`.

    The convolution starts at zero and the projection as the identity. `ttt_proj` is a linear layer
    like any other, `y = x W^T`; the release multiplies by the same tensor **not** transposed, which
    its diagonal initialisation hides: load `ttt_proj.weight` of its checkpoints transposed.

    Args:
        hidden_size: D.
        config: options.
    """

    def __init__(self, hidden_size: int, config: InPlaceConfig) -> None:
        super().__init__()
        self.ttt_conv = ChunkConv(hidden_size, config.kernel_size, config.symmetric)
        if config.projection:
            self.ttt_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.projects = config.projection
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The identity for the projection; the convolution resets itself."""
        if self.projects:
            nn.init.eye_(self.ttt_proj.weight)

    def project(self, convolved: Tensor) -> Tensor:
        """Values V `[B, T, D]` from convolved targets."""
        return self.ttt_proj(convolved) if self.projects else convolved


class InPlaceMLP(nn.Module, InDeepContext):
    """Stands in the place of a gated MLP, whose down projection every chunk of tokens changes.

        Z = act(x W_gate) * (x W_up),   O = Z (W_down + S_i)^T,   S_{i+1} = S_i + eta V_i^T Z_i

    for chunk i, with V convolved and projected from targets: the input of the MLP, or what the
    caller gives (the embeddings of the tokens, for models trained from scratch). S begins at zero
    in every document and is state, never written into W_down. As long as the convolution is zero,
    as it is at first, outputs are those of the MLP bit for bit.
    Source: "In-Place Test-Time Training", 2026, arXiv:2604.06169, section 3.

    The MLP's own modules keep their names; what is new is in `ttt`.

    Attributes:
        slot: name of the layer in `FastState`.
        context: of the decoder layer it is in, where what the caller does not give comes from.

    Args:
        mlp: with `gate_proj`, `up_proj`, `down_proj` (without bias) and `act_fn`.
        config: options.

    Raises:
        TypeError: the MLP is of another kind.
    """

    slot: str = ""
    context: DeepContext | None = None

    def __init__(self, mlp: nn.Module, config: InPlaceConfig) -> None:
        super().__init__()
        missing = [name for name in PARTS if not hasattr(mlp, name)]
        if missing:
            raise TypeError(
                f"{type(mlp).__name__} has no {', '.join(missing)}: In-Place TTT needs a gated MLP "
                "as Llama, Qwen and Gemma have it"
            )
        down = mlp.down_proj
        if type(down) is not nn.Linear or down.bias is not None:
            bias = "" if getattr(down, "bias", None) is None else " with bias"
            raise TypeError(
                f"down_proj must be a plain nn.Linear without bias, but is a {type(down).__name__}"
                f"{bias}: its weight is the one that learns; put other adapters on gate_proj and "
                "up_proj"
            )
        self.config = config
        object.__setattr__(self, "base", mlp)  # not a submodule: its parts are
        for name in PARTS:
            setattr(self, name, getattr(mlp, name))
        targets = InPlaceTargets(down.out_features, config)
        self.ttt = targets.to(device=down.weight.device, dtype=down.weight.dtype)

    def unwrap(self) -> nn.Module:
        """The MLP that was wrapped, with the parts as they are now: some may have adapters."""
        for name in PARTS:
            setattr(self.base, name, getattr(self, name))
        return self.base

    def own_slot(self) -> str:
        """`slot`.

        Raises:
            ValueError: no slot is set.
        """
        if not self.slot:
            raise ValueError(
                "the MLP has no slot for its state: set mlp.slot to a name that no other layer "
                "has, e.g. its path in the model"
            )
        return self.slot

    def forward(
        self,
        x: Tensor,
        *,
        target_states: Tensor | None = None,
        mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        fast_state: FastState | None = None,
    ) -> Tensor:
        """The MLP, with what its down projection has learned.

        Args:
            x: `[B, T, D]`.
            target_states: what values are made from, `[B, T, D]`; None: x.
            mask: real tokens, bool `[B, T]`; the others write nothing and take no place in a chunk,
                but read.
            document_ids: int64 `[B, T]`; every document starts with S = 0.
            fast_state: handle on the carried state; None starts fresh and keeps nothing.

        Returns:
            `[B, T, D]`.

        Raises:
            ValueError: x is not a batch of rows of tokens, or the targets have another shape.
            TypeError: down_proj was replaced since.
        """
        if type(self.down_proj) is not nn.Linear:
            raise TypeError(
                f"down_proj has become a {type(self.down_proj).__name__}, which In-Place TTT would "
                "pass over, as it reads the weight: put other adapters on gate_proj and up_proj"
            )
        if x.dim() != 3:
            raise ValueError(
                f"x must be [B, T, D], but has shape {list(x.shape)}: tokens without rows (as MoE "
                "experts get them) have no order to learn in"
            )
        targets = x if target_states is None else target_states
        if targets.shape != x.shape:
            raise ValueError(
                f"target_states must have the shape of x, {list(x.shape)}, but have "
                f"{list(targets.shape)}"
            )
        if self.context is not None and fast_state is None:
            fast_state = self.context.state_for(self.own_slot())
            mask = self.context.mask if mask is None else mask
            document_ids = self.context.document_ids if document_ids is None else document_ids
        state = None
        if fast_state is not None:
            state = fast_state.read(self.own_slot(), InPlaceMLPState)
        adapt = fast_state is None or fast_state.adapt
        group = None if fast_state is None else fast_state.group
        z = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        o, after = self._remember(z, targets, mask, document_ids, state, adapt, group)
        if fast_state is not None:
            fast_state.write(self.own_slot(), after)
            if fast_state.listens("fast_weight"):
                self._publish_norms(fast_state, after.dw)
        return o

    @torch.no_grad()
    def _publish_norms(self, fast_state: FastState, dw: Tensor) -> None:
        """Sizes of what was learned, `[B, 1]`, and of the weight that it is added to, `[1]`."""
        fast_state.publish(
            "fast_weight",
            self.own_slot(),
            state_norm=dw.flatten(1).norm(dim=1, keepdim=True),
            weight_norm=self._weight_norm().to(dw.dtype).view(1),
        )

    def _remember(
        self,
        z: Tensor,
        targets: Tensor,
        mask: Tensor | None,
        document_ids: Tensor | None,
        state: InPlaceMLPState | None,
        adapt: bool,
        group: ProcessGroup | None,
    ) -> tuple[Tensor, InPlaceMLPState]:
        """Outputs `[B, T, D]` and the next state."""
        conv, size, stream = self.ttt.ttt_conv, self.config.chunk_size, None
        if group is not None:
            state = fresh_state(targets, z, conv) if state is None else state
            stream = share_stream(targets, z, conv, size, mask, document_ids, state, group)
            state = stream.before
        plan = plan_stream(targets, size, conv.future, mask, document_ids, state)
        held, values, kept = convolve(conv, targets, plan, state)
        reading = Reading(z, values, mask, document_ids, None)
        if state is not None:
            reading = resume(reading, held, plan, state)
        o, memory = in_place(
            reading.z,
            self.ttt.project(reading.v),
            self.down_proj.weight,
            self._eta(plan, z, reading.z.shape[1] - z.shape[1]),
            chunk_size=size,
            clip=self._clip(),
            mask=reading.mask,
            document_ids=reading.document_ids,
            state=reading.state,
            adapt=adapt,
            group=group,
            part=None if stream is None else part_of(reading, size, stream),
        )
        o = o[:, -z.shape[1] :]
        if stream is not None:
            return o, InPlaceMLPState(*memory[:2], stream.targets, stream.held, *memory[2:])
        waiting = hold(z, plan, conv.future, state)
        return o, InPlaceMLPState(memory.dw, memory.pending_dw, kept, waiting, *memory[2:])

    def _clip(self) -> Tensor | None:
        """The largest norm of a chunk's addition."""
        return None if self.config.clip is None else self.config.clip * self._weight_norm()

    def _weight_norm(self) -> Tensor:
        """Frobenius norm of the learned weight, in float32 at least, without a gradient."""
        weight = self.down_proj.weight.detach()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return torch.linalg.vector_norm(weight, dtype=dtype)

    def _eta(self, plan: StreamPlan, z: Tensor, held: int) -> float | Tensor:
        """The step size, 0 for tokens whose values are not known yet."""
        if not self.ttt.ttt_conv.future:
            return self.config.eta
        dtype = torch.promote_types(z.dtype, torch.float32)
        return self.config.eta * writes(plan, held).to(dtype)

    def extra_repr(self) -> str:
        """Options, for `print(model)`."""
        return str(self.config)
