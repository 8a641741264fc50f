"""TTT by matrix products over whole mini-batches: what TTT-Linear and TTT-MLP share.

The gradients `G_j` of a mini-batch are taken at the weights W with which it starts, so that no
token waits for another (dual form, TTT: Sun et al. 2024, arXiv:2407.04620, section 2.5). Query i
reads

    q_i W - sum_j tau_i eta_j (q_i . k_j) G_j           with j <= i if causal, or
    q_i W'  where  W' = W - sum_j eta_j k_j^T G_j       if not causal: the same, cheaper if 2m > D.

The gradient of a bias is `G_j`, which adds 1 to every `q_i . k_j`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, pad

from lightning_modules.ops.grid import (
    Grid,
    Progress,
    arrange,
    open_mini_batch,
    plan_grid,
    restore,
)

Tensors = tuple[Tensor, ...]
State = TypeVar("State", bound=tuple[Tensor, ...])


class Options(NamedTuple):
    """The keywords of the TTT ops."""

    mini_batch_size: int | None
    causal: bool
    token_eta: Tensor | None
    mask: Tensor | None
    write_mask: Tensor | None
    document_ids: Tensor | None
    flush: bool
    eps: float


class MiniBatches(NamedTuple):
    """The tokens of N mini-batches, to be read one after the other.

    Attributes:
        q: queries, `[N, H, B, m, D]`.
        k: keys, `[N, H, B, m, D]`.
        offset: `gamma (beta - target)`: with it the gradient of the inner loss at the normalised
            prediction zh is `gamma^2 zh + offset`, `[N, H, B, m, D]`.
        square: `gamma^2`, `[H, 1, 1, D]`.
        step: `-c_j`, c_j the weight of `G_j` in the next state, `[N, H, B, m, 1]`.
        mix: `-tau_i eta_j`, 0 where i must not see j, `[N, H, B, m or 1, m]`; None: read the
            updated weights.
        restart: mini-batches that start from the learned weights, `[N, B]`; None: none does.
        eps: of the LayerNorm.
    """

    q: Tensor
    k: Tensor
    offset: Tensor
    square: Tensor
    step: Tensor
    mix: Tensor | None
    restart: Tensor | None
    eps: float


Scan = Callable[[MiniBatches, Tensors, Sequence[Tensor | None]], tuple[Tensor, Tensors]]


def run_ttt(
    scan: Scan,
    weights: Tensors,
    state_class: Callable[..., State],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    state: Any | None,
    options: Options,
) -> tuple[Tensor, State]:
    """Cut the call into mini-batches, scan them, put the predictions back and normalise them.

    Args:
        scan: maps mini-batches, learned weights `[H, 1 or B, in, out]` and their changes
            `[H, B, in, out]` (None: still zero) to predictions `[N, H, B, m, D]` and new changes.
        weights: the learned weights, `[H, in, out]` or `[B, H, in, out]` each.
        state_class: the NamedTuple of the op.

    The other arguments and the results are those of the op. Autocast does not apply inside.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(autocast_device(q.device), enabled=False):
        gamma, beta = norm_weight.to(dtype), norm_bias.to(dtype)
        grid, progress = plan(q, state, options)
        size = grid.size if grid is not None else options.mini_batch_size or q.shape[1]
        tokens = _tokens(q, k, v, eta, state, grid, options)
        q_, k_, v_, eta_ = (arrange(x.to(dtype), size, grid) for x in tokens)
        q_, k_, eta_ = q_.contiguous(), k_.contiguous(), eta_.contiguous()
        step, mix = _coefficients(eta_, q.shape, grid, options)
        gamma_, beta_ = gamma[:, None, None], beta[:, None, None]
        offset = torch.addcmul(gamma_ * beta_, gamma_, k_ - v_)
        restart = None if grid is None else grid.restart
        batches = MiniBatches(q_, k_, offset, gamma_.square(), step, mix, restart, options.eps)
        predictions, changes = scan(
            batches, tuple(_heads_first(x, dtype) for x in weights), _changes(state, weights, dtype)
        )
        z = layer_norm(restore(predictions, q.shape[1], grid), q.shape[-1:], eps=options.eps)
        o = torch.addcmul(q + beta, gamma, z)
        if options.mask is not None:
            o = o.masked_fill(~options.mask[..., None, None], 0)
        pending = _pending((k_, v_, eta_), grid, progress, q.shape, options)
    return o.to(q.dtype), state_class(*(x.transpose(0, 1) for x in changes), *pending)


def add(weights: Tensors, changes: Sequence[Tensor | None]) -> Tensors:
    """The weights of each row: learned ones `[H, 1 or B, in, out]` plus changes (None: zero)."""
    return tuple(w if c is None else w + c for w, c in zip(weights, changes, strict=True))


def affine(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x w + b`, `[H, B, m, out]`; one product for all rows where they share the weight.

    Args:
        x: `[H, B, m, in]`.
        weight: `[H, 1 or B, in, out]`.
        bias: `[H, 1 or B, 1, out]`.
    """
    if weight.shape[1] == 1:
        y = (x.flatten(1, 2) @ weight.squeeze(1)).unflatten(1, x.shape[1:3])
        return y if bias is None else y + bias
    if bias is None:
        return x @ weight
    return add_product(bias.expand(*weight.shape[:2], -1, -1), x, weight)


def add_product(base: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
    """`base + x y` (None: zero) for each head and row: x `[H, B, m, in]`, y `[H, B, in, out]`."""
    if base is None:
        return x @ y
    product = torch.baddbmm(base.flatten(0, 1), x.flatten(0, 1), y.flatten(0, 1))
    return product.unflatten(0, x.shape[:2])


class NormError(NamedTuple):
    """The gradient `G` at a prediction z, and what its derivative is made of (`norm_error`)."""

    z: Tensor
    normalised: Tensor
    mean: Tensor
    rstd: Tensor
    h: Tensor
    gradient: Tensor


def norm_error(z: Tensor, offset: Tensor, square: Tensor, eps: float) -> NormError:
    """`G = r P h`: `h = gamma^2 zh + offset`, `r = 1 / std`, `P x = x - mean(x) - zh mean(zh x)`.

    `r P x` is the backward pass of a LayerNorm without weights: one kernel.
    """
    normalised, mean, rstd = torch.native_layer_norm(z, z.shape[-1:], None, None, eps)
    h = torch.addcmul(offset, square, normalised)
    return NormError(z, normalised, mean, rstd, h, _norm_backward(h, z, mean, rstd))


def norm_error_backward(grad: Tensor, at: NormError, square: Tensor) -> tuple[Tensor, Tensor]:
    """`(dz, dh)` of a gradient dG, by hand.

    P is symmetric, so that

        dh  = r P dG
        dzh = gamma^2 dh - r (dG mean(zh h) + h mean(zh dG))
        dz  = r P dzh - r zh mean(dG G)

    The kernel's own derivatives would do for this, but those after it take mean and std for
    constants: second derivatives would be wrong without a word, so callers raise.
    """
    z, normalised, mean, rstd, h, gradient = at
    dh = _norm_backward(grad, z, mean, rstd)
    along_h = (normalised * h).mean(-1, keepdim=True) * rstd
    along_grad = (normalised * grad).mean(-1, keepdim=True) * rstd
    dz = torch.addcmul(square * dh, grad, along_h, value=-1)
    dz = _norm_backward(torch.addcmul(dz, h, along_grad, value=-1), z, mean, rstd)
    scale = (grad * gradient).mean(-1, keepdim=True) * rstd
    return torch.addcmul(dz, normalised, scale, value=-1), dh


def refuse_second_derivatives(op: str, backend: str = "torch") -> None:
    """Raise in a backward pass that is itself to be differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"the {backend} backend of {op} has no second derivatives: leave out "
            "create_graph=True, or use backend='naive'"
        )


class _PredictionGradient(torch.autograd.Function):
    """`norm_error(...).gradient`, differentiable once."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, offset: Tensor, square: Tensor, eps: float) -> Tensor:
        at = norm_error(z, offset, square, eps)
        ctx.save_for_backward(*at, square)
        return at.gradient

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("TTT")
        *at, square = ctx.saved_tensors
        error = NormError(*at)
        dz, dh = norm_error_backward(grad, error, square)
        needed = ctx.needs_input_grad[2]
        dsquare = (dh * error.normalised).sum((1, 2), keepdim=True) if needed else None
        return dz, dh, dsquare, None


def _norm_backward(grad: Tensor, z: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return torch.ops.aten.native_layer_norm_backward(
        grad.contiguous(), z, z.shape[-1:], mean, rstd, None, None, [True, False, False]
    )[0]


def prediction_gradient(z: Tensor, offset: Tensor, square: Tensor, eps: float) -> Tensor:
    """`G = dl/dz` of `l = 1/2 || LN(z; gamma, beta) - target ||^2`, `[H, B, m, D]`.

    With `zh = (z - mean) / std` and `h = gamma^2 zh + gamma (beta - target)` it is
    `G = (D h - sum(h) - zh sum(zh h)) / (D std)`. Differentiable once.

    Args:
        z: predictions before the LayerNorm, `[H, B, m, D]`.
        offset: `gamma (beta - target)`, `[H, B, m, D]`.
        square: `gamma^2`, `[H, 1, 1, D]`.
        eps: of the LayerNorm.
    """
    return _PredictionGradient.apply(z, offset, square, eps)


def unstack(x: Tensor) -> Sequence[Tensor]:
    """The mini-batches of `[N, ...]`; a single one stays a view also in the backward pass."""
    return (x.squeeze(0),) if x.shape[0] == 1 else x.unbind(0)


def stack(parts: Sequence[Tensor]) -> Tensor:
    """The inverse of `unstack`."""
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(list(parts))


def restarted(
    changes: Sequence[Tensor | None], restart: Tensor | None, index: int
) -> Sequence[Tensor | None]:
    """The changes with which mini-batch `index` starts: zero where it begins a document."""
    if restart is None:
        return changes
    begins = restart[index].view(1, -1, 1, 1)
    return [None if x is None else x.masked_fill(begins, 0) for x in changes]


def autocast_device(device: torch.device) -> str:
    """Device type whose autocast is switched off; meta has none.

    A string, and the context manager written where it is used: older dynamo breaks the graph at
    a function that returns one.
    """
    return "cpu" if device.type == "meta" else device.type


def _heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`[H, ...]` or `[B, H, ...]` as `[H, 1 or B, ...]`."""
    x = x.to(dtype)
    return x.unsqueeze(1) if x.dim() == 3 else x.transpose(0, 1).contiguous()


def _changes(state: Any | None, weights: Tensors, dtype: torch.dtype) -> Sequence[Tensor | None]:
    if state is None:
        return [None] * len(weights)
    return [_heads_first(x, dtype) for x in state[: len(weights)]]


def plan(q: Tensor, state: Any | None, options: Options) -> tuple[Grid | None, Progress]:
    """A grid where rows differ in what they hold; otherwise the progress alone."""
    progress, size = Progress.of(state, q), options.mini_batch_size
    continues = options.causal and state is not None
    cut_by_mask = options.mask is not None and size is not None
    if cut_by_mask or continues or options.document_ids is not None:
        pending = size if continues and size is not None else 0
        return plan_grid(q, options.mask, options.document_ids, progress, size, pending)
    new = q.shape[1] if options.mask is None else options.mask.sum(1)
    return None, progress._replace(tokens_seen=progress.tokens_seen + new)


def _tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    state: Any | None,
    grid: Grid | None,
    options: Options,
) -> Tensors:
    """Tokens `[B, S, H, E]`, the state's pending ones before the call's."""
    eta = eta.unsqueeze(-1)
    if options.write_mask is not None:
        eta = eta.masked_fill(~options.write_mask[..., None, None], 0)
    if options.mask is not None and grid is None:
        hidden = ~options.mask[..., None, None]
        q, k, v, eta = (x.masked_fill(hidden, 0) for x in (q, k, v, eta))
    if options.causal and state is not None:
        q = pad(q, (0, 0, 0, 0, state.pending_k.shape[1], 0))
        k = torch.cat([state.pending_k, k], dim=1)
        v = torch.cat([state.pending_v, v], dim=1)
        eta = torch.cat([state.pending_eta.unsqueeze(-1), eta], dim=1)
    return q, k, v, eta


def _coefficients(
    eta: Tensor, shape: torch.Size, grid: Grid | None, options: Options
) -> tuple[Tensor, Tensor | None]:
    """`step` and `mix` of `MiniBatches` from eta `[N, H, B, m, 1]`; shape is that of q."""
    size = eta.shape[-2]
    if not options.causal:
        return -eta, -eta.mT if 2 * size < shape[-1] else None
    tau = options.token_eta
    if tau is None:
        tau = 1 / torch.arange(1, size + 1, device=eta.device, dtype=eta.dtype)
    tau = tau.to(eta.dtype)
    closing = _closing_tau(tau, eta.shape[0], shape[1], grid, options.flush)
    step = -eta * closing[:, None, :, None, None]
    return step, -eta.mT * tau.unsqueeze(1).expand(size, size).tril()


def _closing_tau(tau: Tensor, count: int, time: int, grid: Grid | None, flush: bool) -> Tensor:
    """tau of the token that closes each mini-batch, 0 where one stays open, `[N, 1 or B]`."""
    size = tau.shape[0]
    if grid is not None:
        closed = grid.fill == size
        if flush:
            index = torch.arange(count, device=tau.device).unsqueeze(1)
            closed = closed | (index == grid.last)
        return torch.where(closed, tau[(grid.fill - 1).clamp(min=0)], 0)
    full = tau[-1:].expand(time // size)
    if time % size:
        rest = tau[time % size - 1].unsqueeze(0)
        full = torch.cat([full, rest if flush else torch.zeros_like(rest)])
    return full.unsqueeze(1)


def _pending(
    tokens: Tensors, grid: Grid | None, progress: Progress, shape: torch.Size, options: Options
) -> Tensors:
    """What the state holds beside the changes: the open mini-batch of each row, the progress.

    Args:
        tokens: k, v, eta, `[N, H, B, m, E]`.
        grid: None if all rows are cut alike.
        progress: after this call.
        shape: of q, `[B, T, H, D]`.
        options: of the call.
    """
    batch, time, heads, _ = shape
    size = (options.mini_batch_size or 0) if options.causal else 0
    if not options.causal or options.flush:
        k, v, eta = (x.new_zeros(batch, size, heads, x.shape[-1]) for x in tokens)
        count = torch.zeros_like(progress.pending_count)
    else:
        (k, v, eta), count = open_mini_batch(tokens, time, grid, progress)
    return k, v, eta.squeeze(-1), count, progress.tokens_seen, progress.document_id
