"""The Triton kernels of `ops.ttt_lora`, compiled: results, determinism, waits, compilations."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from ttt_cases import assert_same, differentiate, random_flags
from ttt_lora_cases import FORMS, LoRACase, carried_state, case_of, with_everything

from lightning_modules.ops import TTTLoRAState, ttt_lora_cell

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


# Every one is compiled, which takes seconds: all features and kinds of tiles, not their product.
two_forms = pytest.mark.parametrize("form", ["A_plain", "B_ln"])
SIZES = [
    ("A_plain", 3, 4, False),
    ("B_ln", 6, 16, True),
    ("A_ln", 10, 16, True),
    ("B_plain", 16, 8, False),
    ("A_plain", 33, 16, True),
    ("A_plain", 8, 64, False),
]


def moved(x: Any, dtype: torch.dtype) -> Any:
    if not torch.is_tensor(x):
        return x
    return x.to("cuda", dtype if x.is_floating_point() else x.dtype)


def on_gpu(case: LoRACase, dtype: torch.dtype) -> LoRACase:
    """Tokens in a dtype, all else in float32."""
    tensors = {n: moved(x, dtype if n in "qkv" else torch.float32) for n, x in case.tensors.items()}
    options = {name: moved(x, dtype) for name, x in case.options.items()}
    state = case.state
    if state is not None:
        state = TTTLoRAState(*(moved(x, torch.float32) for x in state))
    return replace(case, tensors=tensors, options=options, state=state)


def back(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: x.cpu().double() if x.is_floating_point() else x.cpu() for n, x in values.items()}


def differentiate_on_gpu(case: LoRACase, backend: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """As `differentiate`, with the same weighting of the outputs."""

    def run(call: LoRACase) -> tuple[Tensor, TTTLoRAState]:
        o, state = on_gpu(call, dtype).run(backend)
        return o.cpu().double(), TTTLoRAState(
            *(x.cpu().double() if x.is_floating_point() else x.cpu() for x in state)
        )

    return differentiate(case, run)


def rounded(case: LoRACase) -> LoRACase:
    """The case with tokens that bfloat16 holds exactly."""
    tokens = {name: case.tensors[name].bfloat16().double() for name in "qkv"}
    return case.with_tensors(**tokens)


@pytest.mark.parametrize("form, size, m, everything", SIZES)
def test_float32_is_naive_float64(form: str, size: int, m: int, everything: bool) -> None:
    case = case_of(form, 37, batch=2, group=2, size=size, mini_batch_size=m)
    if everything:
        case = random_flags(case, 3, "mask", "document_ids")
        before = case_of(form, m + 3, batch=2, group=2, size=size, mini_batch_size=m, seed=7)
        case = case.with_state(before.run("naive")[1])
    expected, expected_gradients = differentiate(case, "naive")
    actual, gradients = differentiate_on_gpu(case, "triton", torch.float32)
    # float32 has 6e-8; the bounds are those of the torch backend, wider where more is summed
    assert_same(actual, expected, 5e-5, "triton")
    assert_same(gradients, expected_gradients, 2e-4, "triton gradient of")


@two_forms
def test_bfloat16_is_naive_float64_of_the_same_tokens(form: str) -> None:
    case = rounded(with_everything(case_of(form, 21, batch=3, group=2), seed=3))
    expected, expected_gradients = differentiate(case, "naive")
    actual, gradients = differentiate_on_gpu(case, "triton", torch.bfloat16)
    # Outputs and gradients of tokens are rounded to bfloat16 (4e-3); states are float32.
    states = [name for name in expected if name != "o"]
    assert_same({"o": actual["o"]}, {"o": expected["o"]}, 1e-2, "triton")
    assert_same({n: actual[n] for n in states}, {n: expected[n] for n in states}, 5e-5, "triton")
    assert_same(gradients, expected_gradients, 2e-2, "triton gradient of")


def large(form: str, dtype: torch.dtype, time: int = 2048) -> LoRACase:
    case = case_of(form, time, batch=8, group=3, size=8, mini_batch_size=16)
    scaled = {name: case.tensors[name] / 3 for name in "qk"}
    return on_gpu(case.with_tensors(**scaled), dtype)


def forward_backward(case: LoRACase, backend: str) -> dict[str, Tensor]:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in case.tensors.items()}
    o, state = case.with_tensors(**leaves).run(backend)
    (o.float().sin().sum() + state.dw.sin().sum()).backward()
    return {"o": o.detach(), "dw": state.dw.detach(), **{n: x.grad for n, x in leaves.items()}}


@two_forms
def test_real_size_is_the_torch_backend(form: str) -> None:
    case = large(form, torch.float32)
    found = (back(forward_backward(case, backend)) for backend in ("triton", "torch"))
    assert_same(*found, 5e-4, "triton")  # float32, 128 mini-batches one after the other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_run_is_the_same_bit_for_bit(dtype: torch.dtype) -> None:
    case = large("B_ln", dtype)
    first = forward_backward(case, "triton")
    for _ in range(3):
        assert_same(forward_backward(case, "triton"), first, 0, "triton")


@pytest.mark.parametrize(
    "form, flags", [("A_plain", ()), ("A_plain", ("mask",)), ("B_ln", ("mask", "document_ids"))]
)
def test_no_call_waits_for_the_gpu(form: str, flags: tuple[str, ...]) -> None:
    case = random_flags(case_of(form, 21, batch=3, group=2), 3, *flags)
    case = on_gpu(carried_state(case, 4), torch.float32)
    forward_backward(case, "triton")  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_backward(case, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def compilations() -> int:
    from lightning_modules.ops.ttt_lora.kernels import backward, forward, tokens

    kernels = (
        forward.scan_kernel,
        forward.read_kernel,
        backward.read_backward_kernel,
        backward.scan_backward_kernel,
        tokens.token_backward_kernel,
    )
    device = torch.cuda.current_device()
    return sum(len(kernel.device_caches[device][0]) for kernel in kernels)


def test_another_length_compiles_nothing() -> None:
    forward_backward(large("A_plain", torch.bfloat16, 256), "triton")
    before = compilations()
    for time in (1, 15, 16, 17, 255, 1024, 2049):
        forward_backward(large("A_plain", torch.bfloat16, time), "triton")
    assert compilations() == before


@two_forms
def test_cell_is_the_torch_backends(form: str) -> None:
    mode, loss = FORMS[form]
    torch.manual_seed(0)
    projected = torch.randn(4, 133, 64, device="cuda", requires_grad=True)
    gate, base = (torch.randn(n, device="cuda", requires_grad=True) for n in ((2,), (2, 11, 10)))
    norm = torch.randn(2, 2, 10, device="cuda", requires_grad=True)
    results = []
    for backend in ("triton", "torch"):
        options = {"mini_batch_size": 16, "mode": mode, "loss": loss, "norm": norm}
        y, state = ttt_lora_cell(
            projected, gate.sigmoid(), base, **options, q_residual=True, backend=backend
        )
        total = y[..., :10].sin().sum() + state.pending_k.sin().sum()
        grads = torch.autograd.grad(total, (projected, gate, base, norm))
        results.append({"y": y[..., :10], "dw": state.dw, **dict(zip("pgbn", grads, strict=True))})
    assert_same(*(back(x) for x in results), 1e-3, "triton")  # float32, steep norms


def test_auto_on_a_gpu_is_triton() -> None:
    case = large("A_plain", torch.bfloat16, 64)
    same = forward_backward(case, "auto"), forward_backward(case, "triton")
    assert_same(*same, 0, "auto")


@pytest.mark.parametrize("flags", [(), ("mask", "document_ids")])
def test_compiled_takes_the_kernels_and_is_the_same(flags: tuple[str, ...]) -> None:
    case = random_flags(case_of("B_ln", 133, batch=3, group=2, size=8), 3, *flags)
    case = on_gpu(carried_state(case, 4), torch.float32)
    names = list(case.tensors)

    def run(backend: str, *values: Tensor) -> tuple[Tensor, Tensor]:
        o, state = case.with_tensors(**dict(zip(names, values, strict=True))).run(backend)
        return o, state.dw

    def results(function: Any, backend: str) -> dict[str, Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in case.tensors.values()]
        o, dw = function(backend, *leaves)
        (o.sin().sum() + dw.sin().sum()).backward()
        grads = {name: x.grad for name, x in zip(names, leaves, strict=True)}
        return {"o": o.detach(), "dw": dw.detach(), **grads}

    torch._dynamo.reset()
    compiled = results(torch.compile(run, fullgraph=True), "auto")
    torch._dynamo.reset()
    assert_same(compiled, results(run, "triton"), 1e-5, "triton")  # fused casts
