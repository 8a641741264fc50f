"""Which backend an op with Triton kernels runs on, and why."""

import logging
import os
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from lightning_modules.ops.checks import Backend, select_backend

logger = logging.getLogger(__name__)


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on a CPU and slowly."""
    return os.environ.get("TRITON_INTERPRET") == "1"


INSTALLED = find_spec("triton") is not None
"""Whether triton can be imported."""


def dispatch(
    op: str,
    backend: str,
    backends: Mapping[str, Backend],
    q: Tensor,
    obstacle: Callable[[], str | None],
    in_graphs: bool = False,
) -> Backend:
    """The implementation to call; "auto" takes "triton" on a GPU where it can, else the first.

    Args:
        op: name of the op.
        backend: the name that the caller gave.
        backends: name -> implementation.
        q: a tensor on the device of the call, in its dtype.
        obstacle: says what of this call the kernels do not do, with the fix; None if they do it
            all. Not asked while torch.compile traces and the kernels cannot be in its graphs, as
            its answer would become a guard.
        in_graphs: the kernels are operations that torch.compile's graphs can have.

    Raises:
        ValueError: if there is no such backend, or if "triton" cannot run this call.
        RuntimeError: if "triton" has nothing to run on.
    """
    if backend == "auto":
        why = unable(q.device.type, q.dtype, in_graphs) or obstacle()
        backend = "triton" if why is None else next(iter(backends))
        # A log would break a graph; on the device "meta" nothing runs.
        if not torch.compiler.is_compiling() and q.device.type != "meta":
            _announce(op, backend, why or "q is on a GPU")
        return backends[backend]
    elif backend == "triton" and backend in backends:
        _require(op, q, obstacle())
    return select_backend(op, backend, backends)


def unable(device: str, dtype: torch.dtype, in_graphs: bool = False) -> str | None:
    """Why "auto" does not take the kernels for such inputs, whatever the op."""
    if torch.compiler.is_compiling() and not in_graphs:
        return "torch.compile makes kernels of the torch backend"
    if device != "cuda":
        return f"q is on the device {device!r}"
    if not INSTALLED:
        return "triton is not installed"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"q is {dtype}"
    return None


def _require(op: str, q: Tensor, obstacle: str | None) -> None:
    """Raise unless the kernels can run this call."""
    if not INSTALLED:
        raise RuntimeError(
            f"{op}: backend='triton' needs triton: pip install triton, or use backend='torch'"
        )
    if q.device.type != "cuda" and not interpreting():
        raise RuntimeError(
            f"{op}: backend='triton' needs a CUDA device, but q is on {q.device.type!r}: move the "
            "inputs to a GPU, use backend='torch', or set TRITON_INTERPRET=1 before Python starts "
            "(a slow interpreter, for tests)"
        )
    dtypes = [torch.float32, torch.bfloat16]
    if q.device.type != "cuda":
        dtypes = [torch.float32, torch.float64]  # the interpreter's bfloat16 products are wrong
    if q.dtype not in dtypes:
        raise ValueError(
            f"{op}: backend='triton' takes q in {' or '.join(map(str, dtypes))} here, but it is "
            f"{q.dtype}: convert it, or use backend='torch'"
        )
    if obstacle is not None:
        raise ValueError(f"{op}: backend='triton' cannot run this call: {obstacle}")


@cache
def _announce(op: str, backend: str, why: str) -> None:
    """Say once which backend "auto" took."""
    logger.info("%s: backend %r, as %s", op, backend, why)
