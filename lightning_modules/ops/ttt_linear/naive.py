"""TTT-Linear token by token: the fast model is one affine map, ``f(x) = x W + b``."""

from torch import Tensor

from lightning_modules.ops.states import TTTLinearState
from lightning_modules.ops.ttt_naive import FastModel, Weights, naive_ttt


class LinearFastModel(FastModel):
    """``f(x) = x W + b`` with W ``[H, D, D]`` (in, out) and b ``[H, 1, D]``."""

    def forward(self, weights: Weights, x: Tensor) -> Tensor:
        """``x W + b``, ``[H, 1, D]``."""
        w, b = weights
        return x @ w + b

    def token_gradient(self, weights: Weights, k: Tensor, v: Tensor) -> Weights:
        """``dl/dW = k^T G`` and ``dl/db = G``, with G the gradient at the output."""
        g = self.output_gradient(self.forward(weights, k), v - k)
        return k.transpose(-2, -1) @ g, g


def naive_ttt_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w: Tensor,
    b: Tensor,
    *,
    mini_batch_size: int | None,
    causal: bool,
    token_eta: Tensor | None,
    mask: Tensor | None,
    write_mask: Tensor | None,
    document_ids: Tensor | None,
    state: TTTLinearState | None,
    flush: bool,
    eps: float,
) -> tuple[Tensor, TTTLinearState]:
    """TTT-Linear, token by token; arguments and results are those of `ops.ttt_linear`."""
    return naive_ttt(
        LinearFastModel(norm_weight, norm_bias, eps),
        (w, b),
        TTTLinearState,
        q,
        k,
        v,
        eta,
        mini_batch_size=mini_batch_size,
        causal=causal,
        token_eta=token_eta,
        mask=mask,
        write_mask=write_mask,
        document_ids=document_ids,
        state=state,
        flush=flush,
    )
