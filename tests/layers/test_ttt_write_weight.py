"""Write weights of a TTT layer: a factor of every token's inner step."""

import pytest
import torch
from gemma_cases import randomise
from torch import Tensor

from lightning_modules.layers.ttt import TTTConfig, TTTLayer

HIDDEN = 16
VARIANTS = [
    {"causal": True, "mini_batch_size": 4},
    {"causal": True, "mini_batch_size": 3, "kind": "mlp"},
    {"mini_batch_size": 3},
    {"eta_over_length": True},
    {},
]


def _case(options: dict) -> tuple[TTTLayer, Tensor]:
    torch.manual_seed(0)
    layer = randomise(TTTLayer(HIDDEN, TTTConfig(num_heads=2, **options))).double()
    return layer, torch.randn(2, 7, HIDDEN, dtype=torch.float64)


@pytest.mark.parametrize("options", VARIANTS)
def test_weight_one_equals_no_weight_bit_for_bit(options: dict) -> None:
    layer, x = _case(options)
    expected, state = layer(x)
    out, after = layer(x, write_weight=torch.ones(2, 7))
    assert torch.equal(out, expected) and all(map(torch.equal, after, state))


@pytest.mark.parametrize("options", VARIANTS)
def test_a_constant_weight_equals_a_smaller_inner_learning_rate(options: dict) -> None:
    layer, x = _case(options)
    base_lr = layer.config.inner_lr
    slower, _ = _case({**options, "base_lr": 0.3 * base_lr})
    expected, _ = slower(x)
    out, _ = layer(x, write_weight=torch.full((2, 7), 0.3, dtype=torch.float64))
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(out, layer(x)[0])


@pytest.mark.parametrize("options", VARIANTS)
def test_weight_zero_equals_a_token_that_may_not_write(options: dict) -> None:
    layer, x = _case(options)
    writes = torch.rand(2, 7) < 0.5
    expected, state = layer(x, write_mask=writes)
    out, after = layer(x, write_weight=writes.double())
    assert torch.equal(out, expected) and all(map(torch.equal, after, state))
    both, _ = layer(x, write_mask=writes, write_weight=torch.ones(2, 7))
    assert torch.equal(both, expected)


@pytest.mark.quick("options0", "options3", "options4")
@pytest.mark.parametrize("options", VARIANTS)
def test_gradients_reach_the_weights_of_tokens_that_others_read(options: dict) -> None:
    layer, x = _case(options)
    weight = torch.rand(2, 7, dtype=torch.float64).requires_grad_()
    layer(x, write_weight=weight)[0].square().sum().backward()
    assert torch.autograd.gradcheck(
        lambda w: layer(x, write_weight=w)[0], weight.detach().requires_grad_()
    )
    assert weight.grad[:, :4].abs().min() > 0
