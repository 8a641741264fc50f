"""A gradient of zero for what an output does not depend on; the output is untouched."""

import torch
from lact_model_cases import hidden, lact_layer

from lightning_modules.layers.reached import reached


def test_the_output_is_the_same_and_others_get_a_gradient_of_zero() -> None:
    weight, other = (torch.randn(3, requires_grad=True) for _ in range(2))
    output = weight.square()
    same = reached(output, other.exp(), None, torch.ones(2))
    assert torch.equal(same, output)
    same.sum().backward()
    assert torch.equal(weight.grad, 2 * weight) and torch.equal(other.grad, torch.zeros(3))


def test_what_has_a_gradient_keeps_it() -> None:
    weight = torch.randn(3, requires_grad=True)
    inner = weight.exp()
    reached(inner.square(), inner).sum().backward()
    torch.testing.assert_close(weight.grad, 2 * (2 * weight.detach()).exp())


def test_in_a_call_in_which_nothing_that_is_written_is_read_lact_still_has_all_gradients() -> None:
    """Otherwise a process whose rows are short would not agree with the others."""
    layer = lact_layer("default")
    output, _ = layer(hidden(length=2))
    output.sum().backward()
    assert not [name for name, p in layer.named_parameters() if p.grad is None]
    assert layer.lr_proj.weight.grad.abs().sum() == 0
