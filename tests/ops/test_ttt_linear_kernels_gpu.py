"""The Triton kernels of TTT-Linear on a GPU: as the naive loop in float64, fast calls."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from ttt_cases import (
    Case,
    assert_same,
    carried_state,
    differentiate,
    make_case,
    outputs,
    random_flags,
    run_in_pieces,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FORMS = {"causal": (True, 4), "causal_16": (True, 16), "scan": (False, 20), "call": (False, None)}
SIZES = {torch.float32: (32, 64), torch.bfloat16: (32, 64, 96, 128)}
FLAGS = ("mask", "write_mask", "document_ids")
# float32: three tf32 products keep about 21 bits; bfloat16: 8 bits of every operand, through the
# dozen products between an input and its gradient.
TOLERANCES = {torch.float32: (5e-5, 2e-4), torch.bfloat16: (0.02, 0.04)}
every_dtype_and_size = pytest.mark.parametrize(
    ("dtype", "size"),
    [(dtype, size) for dtype, sizes in SIZES.items() for size in sizes],
    ids=lambda value: str(value).removeprefix("torch."),
)

every_form_and_dtype = pytest.mark.parametrize(  # kernels of float32 take long to compile
    ("form", "dtype"),
    [*((form, torch.bfloat16) for form in FORMS), ("causal_16", torch.float32)],
    ids=lambda value: str(value).removeprefix("torch."),
)


def case_of(form: str, size: int, time: int = 37, **sizes: Any) -> Case:
    """A case whose q, k, v bfloat16 can represent, with keys of length 1 as layers make them."""
    causal, mini_batch_size = FORMS[form]
    case = make_case(
        "linear", time=time, causal=causal, mini_batch_size=mini_batch_size, size=size, **sizes
    )
    x = dict(case.tensors)
    for name in ("q", "k"):
        x[name] = torch.nn.functional.normalize(x[name], dim=-1)
    x |= {name: x[name].bfloat16().double() for name in ("q", "k", "v")}
    x["eta"] = x["eta"] * size * (1.0 if causal else 1 / (mini_batch_size or time))
    x["w"] = 0.25 * x["w"]
    return case.with_tensors(**x)


def on_gpu(case: Case, dtype: torch.dtype) -> Case:
    """q, k, v in the dtype, everything else in float32."""
    tokens = ("q", "k", "v")
    tensors = {n: x.cuda().to(dtype if n in tokens else torch.float32)
               for n, x in case.tensors.items()}  # fmt: skip
    options = {n: x.cuda() if torch.is_tensor(x) else x for n, x in case.options.items()}
    state = case.state
    if state is not None:
        moved = (x.float() if x.is_floating_point() else x for x in state)
        state = type(state)(*(x.cuda() for x in moved))
    return replace(case, tensors=tensors, options=options, state=state)


def norm_errors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict:
    """`|| actual - expected || / || expected ||` of what is not zero; integers must be equal."""
    found = {}
    for name, reference in expected.items():
        got = actual[name].cpu()
        if reference.is_floating_point() and reference.numel() and reference.abs().max() > 1e-12:
            found[name] = float((got.double() - reference).norm() / reference.norm())
        elif not reference.is_floating_point():
            assert torch.equal(got, reference), name
    return found


def check(case: Case, dtype: torch.dtype, against: str = "naive", **options: Any) -> None:
    expected = differentiate(case, against, **options)

    def on_the_gpu(call: Case, **given: Any) -> tuple[torch.Tensor, Any]:
        o, state = on_gpu(call, dtype).run("triton", **given)
        return o.cpu().double(), type(state)(*(x.cpu() for x in state))

    actual = differentiate(case, on_the_gpu, **options)
    for got, reference, bound in zip(actual, expected, TOLERANCES[dtype], strict=True):
        errors = norm_errors(got, reference)
        assert all(error <= bound for error in errors.values()), errors


@every_dtype_and_size
def test_triton_is_naive_with_a_mask_and_a_carried_state(dtype: torch.dtype, size: int) -> None:
    case = random_flags(case_of("causal_16", size, batch=2, heads=2), 3, "mask", "write_mask")
    check(carried_state(case, 4), dtype)


@every_form_and_dtype
def test_triton_is_naive_with_everything(form: str, dtype: torch.dtype) -> None:
    case = random_flags(case_of(form, 64, batch=3, heads=2, per_row=True), 5, *FLAGS)
    check(carried_state(case, 5, time=19), dtype, flush=True)


@pytest.mark.parametrize("dtype", SIZES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_triton_is_torch_in_a_row_of_thousands(dtype: torch.dtype) -> None:
    """Of 256 mini-batches, each of which reads what the one before it left behind."""
    check(case_of("causal_16", 64, 4096, batch=1, heads=2), dtype, against="torch")


@every_form_and_dtype
@pytest.mark.parametrize("time", [1, 64])
def test_triton_is_naive_without_flags(time: int, form: str, dtype: torch.dtype) -> None:
    check(case_of(form, 64, time, batch=1, heads=2), dtype)


def test_every_run_gives_the_same_bits() -> None:
    case = on_gpu(case_of("causal_16", 64, 500, batch=2, heads=4), torch.bfloat16)
    first, second = gradients(case), gradients(case)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def gradients(case: Case) -> dict[str, torch.Tensor]:
    """Outputs and gradients on the GPU."""
    leaves = {name: x.clone().requires_grad_() for name, x in case.tensors.items()}
    o, state = case.with_tensors(**leaves).run("triton")
    loss = o.float().square().sum() + state.dw.sum() * 0.5 + state.dw.square().sum()
    found = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"d{name}": g for name, g in zip(leaves, found, strict=True)}
    return outputs(o.detach(), state) | named


def test_one_pass_is_any_split() -> None:
    case = on_gpu(case_of("causal_16", 64, 90, batch=2, heads=2), torch.float32)
    pieces = outputs(*run_in_pieces(case, "triton", [1, 16, 40, 41, 77]))
    # float32, other groups of mini-batches
    assert_same(pieces, outputs(*case.run("triton")), 2e-4, "pieces")


@pytest.mark.parametrize("flags", [(), ("mask",)])
def test_call_without_documents_never_waits_for_the_gpu(flags: tuple[str, ...]) -> None:
    case = random_flags(case_of("causal_16", 64, batch=2, heads=2), 3, *flags)
    case = on_gpu(carried_state(case, 4), torch.bfloat16)
    gradients(case)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_length_or_batch_compiles_nothing() -> None:
    from lightning_modules.ops.ttt_linear.kernels import backward, forward, inputs

    kernels = [
        forward.write_kernel,
        forward.read_kernel,
        backward.output_gradient_kernel,
        backward.weight_gradient_kernel,
        inputs.input_gradient_kernel,
    ]

    def compiled() -> list[int]:
        return [sum(len(found[0]) for found in kernel.device_caches.values()) for kernel in kernels]

    def run(time: int, batch: int) -> None:
        gradients(on_gpu(case_of("causal_16", 64, time, batch=batch, heads=2), torch.bfloat16))

    run(48, 2)
    before = compiled()
    for time, batch in ((1, 1), (16, 1), (33, 3), (512, 16), (1000, 2)):
        run(time, batch)
    assert compiled() == before


def test_auto_is_triton_on_a_gpu_and_torch_where_kernels_end() -> None:
    case = on_gpu(case_of("causal_16", 64, batch=1, heads=2), torch.bfloat16)
    assert torch.equal(case.run("auto")[0], case.run("triton")[0])
    long = on_gpu(case_of("call", 64, 70, batch=1, heads=2), torch.bfloat16)
    assert torch.equal(long.run("auto")[0], long.run("torch")[0])


@pytest.mark.parametrize(("form", "size", "time"), [("causal_16", 64, 90), ("call", 128, 51)])
def test_compiled_auto_is_triton_bit_for_bit(form: str, size: int, time: int) -> None:
    case = on_gpu(case_of(form, size, time, batch=2, heads=2), torch.bfloat16)
    names = list(case.tensors)

    def run(backend: str, values: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        o, state = case.with_tensors(**dict(zip(names, values, strict=True))).run(backend)
        return o, state.dw, state.db

    def results(function: Any, backend: str) -> list[torch.Tensor]:
        leaves = [case.tensors[name].clone().requires_grad_() for name in names]
        found = function(backend, leaves)
        loss = sum(x.float().square().sum() for x in found)
        return [*found, *torch.autograd.grad(loss, leaves)]

    torch._dynamo.reset()
    whole = torch.compile(run, backend="aot_eager", fullgraph=True)
    for x, y in zip(results(whole, "auto"), results(run, "triton"), strict=True):
        assert torch.equal(x, y)
