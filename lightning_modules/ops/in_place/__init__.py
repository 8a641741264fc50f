"""In-Place TTT: a linear layer whose weight is written once per chunk of tokens."""

from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_modules.ops.checks import select_backend
from lightning_modules.ops.in_place.checks import check_in_place
from lightning_modules.ops.in_place.eager import eager_in_place
from lightning_modules.ops.in_place.naive import naive_in_place
from lightning_modules.ops.in_place.shared import Part
from lightning_modules.ops.states import InPlaceState

BACKENDS = {"torch": eager_in_place, "naive": naive_in_place}

__all__ = ["in_place"]


def in_place(
    z: Tensor,
    v: Tensor,
    w_down: Tensor,
    eta: float | Tensor,
    *,
    chunk_size: int,
    clip: float | Tensor | None = None,
    mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    state: InPlaceState | None = None,
    adapt: bool = True,
    group: ProcessGroup | None = None,
    part: Part | None = None,
    backend: str = "auto",
) -> tuple[Tensor, InPlaceState]:
    """Read a sequence with a linear map to which every chunk of it adds its outer products.

    All tokens t of chunk i are read with the same weight, which has seen the chunks before it:

        o_t = (W_down + S_i) z_t
        S_0 = 0,   S_{i+1} = S_i + clip(sum_{t in chunk i} eta v_t z_t^T)

    A chunk is added as soon as its last token has been read. There is no error term and no decay:
    it is one step of gradient descent on `-<W z_t, v_t>`.
    Source: "In-Place Test-Time Training", 2026, arXiv:2604.06169, section 3.

    Args:
        z: inputs of the map, which are also its keys, `[B, T, F]`, T at least 1.
        v: values, `[B, T, D]`.
        w_down: learned weight, `[D, F]`, never written.
        eta: step size, a number or a tensor without axes, or one for each token, `[B, T]`: 0 does
            not write, but takes its place in a chunk.
        chunk_size: C, tokens of a chunk; the same in all calls of a stream.
        clip: largest Frobenius norm of what a chunk adds, a number or a tensor without axes (whose
            sign is not checked: it would wait for the device): a larger one is scaled down to it,
            and gradients go through the factor. None: no bound.
        mask: tokens that exist, bool `[B, T]`. The others write nothing and take no place in a
            chunk; their outputs are what the state would read there. None: all.
        document_ids: integers `[B, T]`: a token with another id than the one before (or than the
            state's) starts with S = 0 in a new chunk. None: one document without end.
        state: what an earlier call returned; None, or all zeros in a row: S = 0.
        adapt: False: the tokens of the call do not write, as with an eta of 0.
        group: processes that share the rows: each brings the p-th of P parts of the same length T,
            with its mask and documents, and gets its outputs. The state is that of the whole rows,
            the same on all; the gradient of w_down is the sum over the processes (see
            `ops.processes`).
        part: with a group, where the own tokens stand; None: found from mask and documents, if no
            token is given to two processes.
        backend: "torch" (fast), "naive" (a loop over tokens that defines the result), or "auto"
            (the fastest there is).

    Returns:
        Outputs `[B, T, D]`, and the state after the last token. `W_down z` is computed as a linear
        layer does, autocast included, and what S adds in float32 (float64 if z is), so that
        outputs are bit for bit those of the layer as long as S is zero. If z and v are bfloat16
        and the call has 64 tokens or more, products are of bfloat16 numbers, accumulated in
        float32. The state keeps its autograd graph: detach it where backpropagation through time
        is to stop.

    Raises:
        ValueError: if shapes, dtypes or options do not fit together.
        TypeError: if the state is of another op.
    """
    run = select_backend("in_place", backend, BACKENDS)
    options: dict[str, Any] = {
        "chunk_size": chunk_size,
        "clip": clip,
        "mask": mask,
        "document_ids": document_ids,
        "state": state,
    }
    check_in_place(z, v, w_down, eta, **options)
    return run(z, v, w_down, eta if adapt else 0.0, **options, group=group, part=part)
