"""In-Place TTT token by token: the readable definition that the fast backend is tested against.

The hidden state is the weight of a linear map (arXiv:2604.06169, section 3). Its tokens are cut
into chunks: each token is read with the weight as the chunk found it, and leaves its outer product
`eta v z^T` to be added when the chunk is full.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import linear

from lightning_modules.ops.in_place.shared import Part
from lightning_modules.ops.states import InPlaceState
from lightning_modules.ops.ttt_eager import autocast_device


class Memory:
    """The change of the weight in one row while its tokens go by.

    Args:
        like: any tensor `[D, F]` of the dtype and on the device of the change.
        chunk_size: C.
        clip: largest norm of what a chunk adds, or None.
    """

    def __init__(self, like: Tensor, chunk_size: int, clip: float | Tensor | None) -> None:
        self.like, self.chunk_size, self.clip = like, chunk_size, clip
        self.document = 0
        self.restart()

    def restart(self) -> None:
        """The state of a row that has seen nothing."""
        self.dw = self.open = torch.zeros_like(self.like)
        self.count = self.tokens_seen = 0

    def enter(self, document: int | None) -> None:
        """Restart if the next token belongs to another document than the last one did."""
        if document is None:
            return
        if self.tokens_seen > 0 and document != self.document:
            self.restart()
        self.document = document

    def read(self, z: Tensor) -> Tensor:
        """What the change adds to the output of a token, `S z`, `[D]`."""
        return self.dw @ z

    def write(self, z: Tensor, v: Tensor, eta: Tensor) -> None:
        """Leave the outer product of a token with the open chunk, and close that if it is full."""
        self.open = self.open + eta * torch.outer(v, z)
        self.count += 1
        self.tokens_seen += 1
        if self.count == self.chunk_size:
            self.dw = self.dw + self._clipped(self.open)
            self.open, self.count = torch.zeros_like(self.open), 0

    def _clipped(self, change: Tensor) -> Tensor:
        norm = change.square().sum().sqrt()
        if self.clip is None or norm <= self.clip:
            return change
        return change * (self.clip / norm)


def naive_in_place(
    z: Tensor,
    v: Tensor,
    w_down: Tensor,
    eta: float | Tensor,
    *,
    chunk_size: int,
    clip: float | Tensor | None,
    mask: Tensor | None,
    document_ids: Tensor | None,
    state: InPlaceState | None,
    group: ProcessGroup | None,
    part: Part | None,
) -> tuple[Tensor, InPlaceState]:
    """In-Place TTT by a loop; arguments and results are those of `ops.in_place`.

    Raises:
        ValueError: if there is a group.
    """
    if group is not None:
        raise ValueError("the naive backend has no group: use backend='torch' to share rows")
    base, dtype = linear(z, w_down), torch.promote_types(z.dtype, torch.float32)
    z, v = z.to(dtype), v.to(dtype)
    rates = torch.as_tensor(eta, dtype=dtype, device=z.device).expand(z.shape[:2])
    rows, memories = [], []
    with torch.autocast(autocast_device(z.device), enabled=False):
        for row in range(z.shape[0]):
            memory = Memory(torch.zeros_like(w_down, dtype=dtype), chunk_size, clip)
            if state is not None:
                _resume(memory, state, row)
            parts = []
            for t in range(z.shape[1]):
                is_real = mask is None or bool(mask[row, t])
                if is_real:
                    memory.enter(None if document_ids is None else int(document_ids[row, t]))
                parts.append(memory.read(z[row, t]))
                if is_real:
                    memory.write(z[row, t], v[row, t], rates[row, t])
            rows.append(torch.stack(parts))
            memories.append(memory)
    return (base + torch.stack(rows)).to(base.dtype), _pack(memories)


def _resume(memory: Memory, state: InPlaceState, row: int) -> None:
    """Continue from a carried state."""
    dtype = memory.like.dtype
    memory.dw, memory.open = state.dw[row].to(dtype), state.pending_dw[row].to(dtype)
    memory.count = int(state.pending_count[row])
    memory.tokens_seen = int(state.tokens_seen[row])
    memory.document = int(state.document_id[row])


def _pack(memories: list[Memory]) -> InPlaceState:
    """Stack the rows into a state."""

    def integers(name: str) -> Tensor:
        values = [getattr(memory, name) for memory in memories]
        return torch.tensor(values, dtype=torch.int64, device=memories[0].dw.device)

    return InPlaceState(
        dw=torch.stack([memory.dw for memory in memories]),
        pending_dw=torch.stack([memory.open for memory in memories]),
        pending_count=integers("count"),
        tokens_seen=integers("tokens_seen"),
        document_id=integers("document"),
    )
