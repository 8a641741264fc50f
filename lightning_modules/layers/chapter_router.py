"""Which chapters of a memory bank a token reads."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.layers.block_pooling import pool_blocks
from lightning_modules.layers.documents import Known, document_starts, last_document
from lightning_modules.layers.memory_options import RouterConfig
from lightning_modules.layers.pooling import (
    Pooled,
    RouterState,
    first_position,
    mean_of,
    pool_prompt,
    pool_sequence,
    pool_window,
)
from lightning_modules.layers.router import (
    INIT_STD,
    entropy,
    init_router,
    log_weights,
    masked_mean,
    router_logits,
    top_k,
)
from lightning_modules.layers.router_load import RouterLoad, chosen_of


class Routing(NamedTuple):
    """What a router decided: n decisions per row, each for `block_size` tokens one after another.

    Attributes:
        chapters: absolute numbers of the chapters chosen, the best first, int64 `[B, n, k]`.
        log_weights: logarithms of their weights, `routed_scaling` included, `[B, n, k]`.
        block_size: tokens of a decision; the last one may be for fewer. n is
            `ceil(T / block_size)`.
        state: what to continue with; None if the strategy carries nothing.
        logits: scores of the routed chapters, float32 at least, `[B, n, C - S]`.
        shared: S, chapters that precede the routed ones.
    """

    chapters: Tensor
    log_weights: Tensor
    block_size: int
    state: RouterState | None
    logits: Tensor
    shared: int

    def decisions(self, mask: Tensor | None = None) -> Tensor:
        """Decisions that count, bool `[B, n]`: those for a token of `mask`, bool `[B, T]`."""
        rows, count = self.logits.shape[:2]
        if mask is None:
            return torch.ones(rows, count, dtype=torch.bool, device=self.logits.device)
        if self.block_size == 1:
            return mask
        mask = F.pad(mask, (0, count * self.block_size - mask.shape[1]))
        return mask.view(rows, count, self.block_size).any(2)

    def losses(self, config: RouterConfig, mask: Tensor | None = None) -> dict[str, Tensor]:
        """The losses whose coefficient is not 0, times it, over the decisions of all processes.

        Args:
            config: of the router.
            mask: tokens that count, bool `[B, T]`: real ones, of rows that have a file.

        Returns:
            Scalars `router_balance`, `router_load` and `router_z`, as far as they are asked for;
            see `RouterLoad`. All processes must ask alike: it is one transfer.
        """
        losses = {
            "router_balance": (config.balance_coefficient, RouterLoad.balance),
            "router_load": (config.load_coefficient, RouterLoad.deviation),
            "router_z": (config.z_coefficient, RouterLoad.z_loss),
        }
        wanted = {name: pair for name, pair in losses.items() if pair[0] > 0}
        if not wanted:
            return {}
        load = RouterLoad.of(self.logits, self.chapters - self.shared, self.decisions(mask))
        load = load.over_ranks()
        return {name: coefficient * loss(load) for name, (coefficient, loss) in wanted.items()}

    @torch.no_grad()
    def statistics(self, mask: Tensor | None = None) -> dict[str, Tensor]:
        """What a monitor shows, over the decisions of every row that count (`mask` as above).

        Returns:
            Sums: `counts [B, C - S]`, how often each routed chapter was chosen, `probability
            [B, C - S]`, and `decisions [B]`. Means, 0 without a decision: `entropy [B]` of the
            probabilities in nats, `top_k_mass [B]`, the probability of the chosen chapters,
            `z [B]`, the squared logsumexp of the logits, and `changed [B]`, the share of
            decisions that chose another set of chapters than the one just before.
        """
        counted = self.decisions(mask)
        chosen = chosen_of(self.chapters - self.shared, self.logits.shape[-1])
        probabilities = self.logits.softmax(-1)
        each = counted.unsqueeze(-1)
        values = [
            entropy(probabilities),
            torch.where(chosen, probabilities, 0.0).sum(-1),
            self.logits.logsumexp(-1).square(),
        ]
        means = masked_mean(torch.stack(values, dim=-1), counted, dim=1)
        pairs = counted[:, 1:] & counted[:, :-1]
        changed = (chosen[:, 1:] != chosen[:, :-1]).any(-1) & pairs
        return {
            "counts": (chosen & each).sum(1).to(means.dtype),
            "probability": torch.where(each, probabilities, 0.0).sum(1),
            "decisions": counted.sum(1).to(means.dtype),
            "entropy": means[:, 0],
            "top_k_mass": means[:, 1],
            "z": means[:, 2],
            "changed": changed.sum(1).to(means.dtype) / pairs.sum(1).clamp(min=1),
        }


class ChapterRouter(nn.Module):
    """`logits = r W^T + b`, `p = softmax(logits)`: the k chapters with the largest p, and weights.

    What a decision is made on, r, is the strategy's mean of hidden states; where no token is in
    that mean (the first block, an answer without a prompt) it is a learned vector. It begins at
    random, as the router does: at 0 all chapters would tie, and the first k would get every first
    block. Logits and means are in float32 at least, also under autocast. All strategies but
    `sequence` are causal, and a row read in pieces is routed as if read at once.

    Args:
        hidden_size: d.
        config: how chapters are chosen.
    """

    default_vector: nn.Parameter | None

    def __init__(self, hidden_size: int, config: RouterConfig) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Linear(hidden_size, config.routed)
        default = torch.empty(hidden_size) if config.strategy in ("block", "prompt") else None
        self.register_parameter(
            "default_vector", None if default is None else nn.Parameter(default)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Nearly uniform probabilities."""
        init_router(self.router)
        if self.default_vector is not None:
            nn.init.normal_(self.default_vector, std=INIT_STD)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        document_alignment: int | None = None,
        prompt_mask: Tensor | None = None,
        state: RouterState | None = None,
    ) -> Routing:
        """Choose chapters for every token, or for every block of tokens where that is the same.

        Args:
            hidden_states: `[B, T, d]`.
            mask: real tokens, bool `[B, T]`; None: all. Decisions for others have no meaning.
            document_ids: int64 `[B, T]`; None: all continue the state's document. An id does not
                come back later in a row.
            document_alignment: what the data promises: rows have no padding on the left, and
                documents, and the call itself, begin at multiples of it in their row. If it is a
                multiple of `block_size`, `block` decides per block, otherwise per token wherever
                the tensors might say different (none of them is read for that): with a state, a
                mask or documents. The decisions are the same.
            prompt_mask: for `prompt`, tokens that are not of an answer, bool `[B, T]`; None: see
                `pool_prompt`.
            state: `Routing.state` of the call before; None starts fresh.

        Raises:
            ValueError: the state is of other rows, or of a router with other options.
        """
        if self.config.strategy == "token":
            return self._route(hidden_states, 1, None)
        self._check(state, hidden_states)
        document = _numbered(hidden_states, mask, document_ids, state)
        start = first_position(hidden_states, mask, state)
        known = {"real": mask, "document": document, "state": state}
        pooled, block_size = self._pool(
            hidden_states, start, document_alignment, prompt_mask, known
        )
        after = RouterState(
            start + hidden_states.shape[1],
            last_document(hidden_states, mask, document_ids, state),
            pooled.total,
            pooled.recent,
        )
        return self._route(mean_of(pooled.sums, self.default_vector), block_size, after)

    def _check(self, state: RouterState | None, x: Tensor) -> None:
        if state is None:
            return
        if len(state.position) != len(x):
            raise ValueError(
                f"the router's state holds {len(state.position)} rows, but the batch has {len(x)}: "
                "select the rows of the state, or start with state=None"
            )
        places = {"block": 1, "rolling": self.config.window - 1}.get(self.config.strategy, 0)
        if state.recent.shape[1] != places:
            raise ValueError(
                f"the router's state holds {state.recent.shape[1]} recent places, but "
                f"strategy={self.config.strategy} needs {places}: keep to one strategy and window, "
                "or start with state=None"
            )

    def _pool(
        self,
        x: Tensor,
        start: Tensor,
        alignment: int | None,
        prompt: Tensor | None,
        known: dict[str, Any],
    ) -> tuple[Pooled, int]:
        """What the strategy pools, and how many tokens share a decision."""
        config = self.config
        if config.strategy == "rolling":
            return pool_window(x, config.window, **known), 1
        if config.strategy == "prompt":
            return pool_prompt(x, prompt, **known), 1
        documents = known["document"] is not None
        if config.strategy == "sequence":
            return pool_sequence(x, **known), 1 if documents else x.shape[1]
        size = config.block_size
        promised = alignment is not None and alignment % size == 0
        at_zero = known["real"] is None and known["state"] is None
        offset = None if promised or at_zero else start % size
        per_token = not promised and (documents or not at_zero)
        pooled = pool_blocks(x, size, offset=offset, per_token=per_token, **known)
        return pooled, 1 if per_token else size

    def _route(self, pooled: Tensor, block_size: int, state: RouterState | None) -> Routing:
        """Decisions on `[B, n, d]`."""
        config = self.config
        logits = router_logits(pooled, self.router)
        choices = top_k(logits, config.top_k)
        weights = log_weights(logits, choices, config.renormalize)
        weights = weights + math.log(config.routed_scaling)
        return Routing(choices + config.shared, weights, block_size, state, logits, config.shared)


def _numbered(
    x: Tensor, mask: Tensor | None, document_ids: Tensor | None, state: RouterState | None
) -> Tensor | None:
    """Number of every token's document in the call, `[B, T]`: 0 continues the state's."""
    if document_ids is None:
        return None
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
    known = None if state is None else Known(state.position > 0, state.document_id)
    return document_starts(document_ids, real, known).cumsum(1)
