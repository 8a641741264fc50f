"""The naive TTT ops against torch.autograd: the formulas, and the whole loops."""

import pytest
import torch
from torch.nn.functional import gelu, layer_norm
from ttt_autograd import autograd_ttt
from ttt_cases import LAYERS, assert_same, carried_state, differentiate, make_case, random_flags

from lightning_modules.ops.ttt_linear.naive import LinearFastModel
from lightning_modules.ops.ttt_mlp.naive import MLPFastModel, gelu_derivative

MODELS = {"linear": LinearFastModel, "mlp": MLPFastModel}


def fast_model(layer: str, eps: float = 1e-6):
    """A fast model with its weights, one key and one value of it."""
    case = make_case(layer, time=1, batch=1, heads=3, size=5, mini_batch_size=None, causal=False)
    model = MODELS[layer](case.tensors["norm_weight"], case.tensors["norm_bias"], eps)
    weights = tuple(case.tensors[name].requires_grad_() for name in LAYERS[layer].weights)
    k, v = (case.tensors[name][0].transpose(0, 1) for name in ("k", "v"))
    return model, weights, k, v


def inner_loss(model, z, target):
    norm = layer_norm(z, z.shape[-1:], eps=model.eps)
    prediction = norm * model.norm_weight[:, None] + model.norm_bias[:, None]
    return 0.5 * (prediction - target).square().sum()


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_output_gradient_is_autograd_of_layer_norm_and_l2(eps: float) -> None:
    model, _, k, v = fast_model("linear", eps)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 1, 5, dtype=torch.float64, generator=generator).mul(0.1).requires_grad_()
    (expected,) = torch.autograd.grad(inner_loss(model, z, v - k), z)
    assert_same({"G": model.output_gradient(z, v - k)}, {"G": expected}, 1e-12, "naive")


@pytest.mark.parametrize("layer", LAYERS)
def test_token_gradient_is_autograd_of_the_inner_loss(layer: str) -> None:
    model, weights, k, v = fast_model(layer)
    loss = inner_loss(model, model.forward(weights, k), v - k)
    expected = torch.autograd.grad(loss, weights)
    actual = model.token_gradient(weights, k, v)
    for name, got, reference in zip(LAYERS[layer].weights, actual, expected, strict=True):
        assert_same({name: got}, {name: reference}, 1e-12, "naive")


def test_gelu_derivative_is_autograd_of_gelu_tanh() -> None:
    x = torch.linspace(-8, 8, 401, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(gelu(x, approximate="tanh").sum(), x)
    assert_same({"slope": gelu_derivative(x)}, {"slope": expected}, 1e-13, "naive")


def check_against_autograd(case, flush: bool) -> None:
    expected, expected_gradients = differentiate(case, autograd_ttt, flush=flush)
    actual, gradients = differentiate(case, "naive", flush=flush)
    # float64 rounding, a few hundred steps deep
    assert_same(actual, expected, 1e-11, "naive")
    assert_same(gradients, expected_gradients, 1e-10, "naive gradient of")


@pytest.mark.quick("16-*", "51-*-linear")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("causal", "size"), [(True, 16), (False, 16), (False, None)], ids=["causal", "scan", "call"]
)
@pytest.mark.parametrize("time", [1, 16, 51])
def test_plain_loop_is_autograd_loop(time: int, causal: bool, size: int | None, layer: str) -> None:
    case = make_case(layer, time=time, mini_batch_size=size, causal=causal, batch=1)
    check_against_autograd(case, flush=True)


@pytest.mark.quick("keep-*-linear", "flush-call-mlp")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("causal", "size"), [(True, 5), (False, 5), (False, None)], ids=["causal", "scan", "call"]
)
@pytest.mark.parametrize("flush", [False, True], ids=["keep", "flush"])
def test_loop_with_everything_is_autograd_loop(
    flush: bool, causal: bool, size: int | None, layer: str
) -> None:
    case = make_case(layer, time=19, mini_batch_size=size, causal=causal, batch=3, per_row=True)
    case = random_flags(case, 1, "mask", "write_mask", "document_ids")
    check_against_autograd(carried_state(case, 2), flush)
