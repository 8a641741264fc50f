"""Linear layers computed with their TTT-LoRA in one node, against the same products one by one."""

import pytest
import torch
import triton_interpreter as triton_interpreter
from torch import Tensor
from torch.nn.functional import linear

from lightning_modules.ops.ttt_lora import Linears, ttt_lora_cell

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")


def results(backend: str, used: tuple[int, ...], joined: bool = True) -> list[Tensor | None]:
    """Outputs, states and gradients of two calls; the loss looks at the layers in `used`."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights, biases = [normal(5, 6), normal(4, 6)], [None, normal(4)]
    x, gate, base, norm = normal(2, 5, 6), normal(2), normal(2, 4, 3), normal(2, 2, 3)
    projections = torch.cat([normal(18, 6), normal(6, 6) * 0])
    outputs = [torch.cat([normal(n, 3), normal(n, 5) * 0], dim=1) for n in (5, 4)]
    leaves = [y.requires_grad_() for y in (x, gate, base, norm, projections, *outputs)]
    state, parts = None, []
    for piece in (x[:, :2], x[:, 2:]):
        group = Linears(piece, projections, weights, biases, outputs, 0.5)
        given = linear(piece, projections), gate.sigmoid(), base
        options = {"mini_batch_size": 2, "norm": norm, "state": state, "backend": backend}
        if joined:
            found, state = ttt_lora_cell(*given, **options, linears=group)
        else:
            o, state = ttt_lora_cell(*given, **options)
            width = o.shape[-1]
            found = [
                linear(piece, weights[n], biases[n])
                + 0.5 * linear(o[:, :, n], outputs[n][:, :width])
                for n in range(2)
            ]
        parts.append(found)
    assert state is not None
    ys = [torch.cat(pair, dim=1) for pair in zip(*parts, strict=True)]
    values = [*(ys[n] for n in used), state.dw, state.db, state.pending_k]
    total = sum(y.sin().sum() for y in values)
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [*ys, *state[:5], *(None if g is None else g[..., :3] for g in found)]


@pytest.mark.parametrize("used", [(0, 1), (1,), ()], ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_together_is_one_by_one(backend: str, used: tuple[int, ...]) -> None:
    actual, expected = results(backend, used), results("torch", used, joined=False)
    for found, wanted in zip(actual, expected, strict=True):
        if wanted is None:  # of a layer that nothing looks at
            assert found is None or not found.any()
        else:  # float64: sums in another order
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_together_has_no_second_derivatives_with_the_kernels() -> None:
    x, projections = (torch.randn(s, dtype=torch.float64) for s in ((1, 2, 4), (8, 4)))
    x.requires_grad_()
    output = torch.zeros(4, 8).double()
    group = Linears(x, projections, [torch.eye(4).double()], [None], [output], 1.0)
    given = linear(x, projections), torch.ones(1).double(), torch.zeros(1, 3, 2).double()
    (y,), _ = ttt_lora_cell(*given, mini_batch_size=2, linears=group, backend="triton")
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
