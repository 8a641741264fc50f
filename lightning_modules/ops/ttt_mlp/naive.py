"""TTT-MLP token by token: the fast model is ``f(x) = gelu(x W1 + b1) W2 + b2``."""

import math

import torch
from torch import Tensor
from torch.nn.functional import gelu

from lightning_modules.ops.states import TTTMLPState
from lightning_modules.ops.ttt_naive import FastModel, Weights, naive_ttt


def gelu_derivative(x: Tensor) -> Tensor:
    """The derivative of ``gelu(x) = x/2 (1 + tanh u)``, ``u = sqrt(2/pi) (x + 0.044715 x^3)``."""
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    tanh = torch.tanh(scale * (x + cubic * x**3))
    inner = scale * (1 + 3 * cubic * x.square())
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh.square()) * inner


class MLPFastModel(FastModel):
    """``f(x) = gelu(x W1 + b1) W2 + b2``.

    W1 ``[H, D, 4D]``, b1 ``[H, 1, 4D]``, W2 ``[H, 4D, D]``, b2 ``[H, 1, D]``.
    """

    def forward(self, weights: Weights, x: Tensor) -> Tensor:
        """``gelu(x W1 + b1) W2 + b2``, ``[H, 1, D]``."""
        w1, b1, w2, b2 = weights
        return gelu(x @ w1 + b1, approximate="tanh") @ w2 + b2

    def token_gradient(self, weights: Weights, k: Tensor, v: Tensor) -> Weights:
        """``dl/dW1 = k^T G1, dl/db1 = G1, dl/dW2 = h^T G2, dl/db2 = G2``.

        With ``x1 = k W1 + b1``, ``h = gelu(x1)``, G2 the gradient at the output and
        ``G1 = (G2 W2^T) gelu'(x1)``.
        """
        w1, b1, w2, b2 = weights
        x1 = k @ w1 + b1
        hidden = gelu(x1, approximate="tanh")
        g2 = self.output_gradient(hidden @ w2 + b2, v - k)
        g1 = (g2 @ w2.transpose(-2, -1)) * gelu_derivative(x1)
        return k.transpose(-2, -1) @ g1, g1, hidden.transpose(-2, -1) @ g2, g2


def naive_ttt_mlp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    mini_batch_size: int | None,
    causal: bool,
    token_eta: Tensor | None,
    mask: Tensor | None,
    write_mask: Tensor | None,
    document_ids: Tensor | None,
    state: TTTMLPState | None,
    flush: bool,
    eps: float,
) -> tuple[Tensor, TTTMLPState]:
    """TTT-MLP, token by token; arguments and results are those of `ops.ttt_mlp`."""
    return naive_ttt(
        MLPFastModel(norm_weight, norm_bias, eps),
        (w1, b1, w2, b2),
        TTTMLPState,
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
