"""The triton backend of LaCT on a GPU: as the torch backend in float64, fast calls."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from lact_cases import FLAGS, Case, carried_state, make_case, random_flags, run_in_pieces
from ttt_cases import differentiate, outputs

from lightning_modules.ops.lact import few
from lightning_modules.ops.lact.launch_tokens import gather

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Relative in the norm. float32: 6e-8 a product, through some ten updates; bfloat16: 8 bits of every
# factor and of what lies between two products, through the dozen products behind a gradient.
TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (0.02, 0.05)}
# Muon makes all singular values alike, and with the small ones their rounding errors large.
MUON_FACTOR = 5
MUON = {"muon": True, "muon_dtype": torch.float32}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {"momentum": False},
    "momentum": {},
    "muon_prenorm": {"prenorm": True, **MUON},
    "stack": {"blocks": 2, "residual": True},
}
every_dtype = pytest.mark.parametrize(
    "dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def case_of(size: int, time: int = 300, chunk_size: int = 64, **options: Any) -> Case:
    """A case whose tokens bfloat16 can represent, with rates as layers have them."""
    sizes = {"size": size, "hidden": size, "batch": 2, "heads": 2} | options
    case = make_case(time=time, chunk_size=chunk_size, **sizes)
    x = dict(case.tensors)
    x |= {name: x[name].bfloat16().double() for name in ("q", "k", "v")}
    x["lr"] = x["lr"] / chunk_size
    return case.with_tensors(**x)


def on_gpu(case: Case, dtype: torch.dtype) -> Case:
    """q, k, v in the dtype, everything else in float32 (float64 if that is the dtype)."""
    wide = torch.promote_types(dtype, torch.float32)
    tensors = {
        n: x.cuda().to(dtype if n in ("q", "k", "v") else wide) for n, x in case.tensors.items()
    }
    options = {n: x.cuda() if torch.is_tensor(x) else x for n, x in case.options.items()}
    state = case.state
    if state is not None:
        moved = (x.to(wide) if x.is_floating_point() else x for x in state)
        state = type(state)(*(x.cuda() for x in moved))
    return replace(case, tensors=tensors, options=options, state=state)


def norm_errors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict:
    """`|| actual - expected || / || expected ||` of what is not zero; integers must be equal."""
    found = {}
    for name, reference in expected.items():
        got = actual[name]
        if not reference.is_floating_point():
            assert torch.equal(got, reference), name
        elif reference.numel() and reference.abs().max() > 1e-12:
            found[name] = float((got.double() - reference).norm() / reference.norm())
    return found


def check(case: Case, dtype: torch.dtype, **options: Any) -> None:
    """Against the torch backend in float64, which the CPU's tests hold against the loop."""
    expected = differentiate(on_gpu(case, torch.float64), "torch", **options)
    actual = differentiate(on_gpu(case, dtype), "triton", **options)
    factor = MUON_FACTOR if case.options.get("muon") else 1
    for got, reference, bound in zip(actual, expected, TOLERANCES[dtype], strict=True):
        errors = norm_errors(got, reference)
        assert all(error <= factor * bound for error in errors.values()), errors


@every_dtype
@pytest.mark.parametrize("size", [32, 64, 96, 384])
@pytest.mark.parametrize("name", FEATURES)
def test_triton_is_torch_in_float64(name: str, size: int, dtype: torch.dtype) -> None:
    # twice as many tokens as channels, or Muon would blow up directions of rounding errors alone
    check(case_of(size, 4 * 2 * size + 9, 2 * size, **FEATURES[name]), dtype)


@every_dtype
@pytest.mark.parametrize("size", [64, 384])
@pytest.mark.parametrize("name", ["plain", "momentum"])
def test_large_chunks_are_torch_in_float64(
    name: str, size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few, "ROWS", 0)  # a launch for each product
    check(case_of(size, 4 * 2 * size + 9, 2 * size, **FEATURES[name]), dtype)


@every_dtype
@pytest.mark.parametrize("name", FEATURES)
def test_triton_is_torch_with_rows_that_differ_and_a_state(name: str, dtype: torch.dtype) -> None:
    case = random_flags(case_of(64, batch=3, time=200, **FEATURES[name]), 3, *FLAGS)
    check(carried_state(case, 4, time=90), dtype)


@every_dtype
@pytest.mark.parametrize("time", [1, 64, 65, 129])
def test_triton_is_torch_in_one_row(time: int, dtype: torch.dtype) -> None:
    check(case_of(96, time, batch=1), dtype)


@pytest.mark.parametrize("hidden", [32, 48, 100])
def test_triton_is_torch_where_hidden_channels_are_not_as_many(hidden: int) -> None:
    check(case_of(64, hidden=hidden, prenorm=True, **MUON), torch.float32)


def test_queries_cut_out_of_one_projection_need_no_copy_before() -> None:
    """Tokens with strides, as a layer's are, give the same bits."""
    case = on_gpu(case_of(64), torch.bfloat16)
    fused = torch.cat([case.tensors[name] for name in ("q", "k", "v")], dim=-1)
    cut = dict(zip(("q", "k", "v"), fused.chunk(3, dim=-1), strict=True))
    first, second = outputs(*case.run("triton")), outputs(*case.with_tensors(**cut).run("triton"))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def gradients(case: Case, **options: Any) -> dict[str, torch.Tensor]:
    """Outputs and gradients on the GPU."""
    leaves = {name: x.clone().requires_grad_() for name, x in case.tensors.items()}
    o, state = case.with_tensors(**leaves).run("triton", **options)
    loss = o.float().square().sum() + state.w0.square().sum() + state.w1.sum()
    found = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"d{name}": g for name, g in zip(leaves, found, strict=True)}
    return outputs(o.detach(), state) | named


@pytest.mark.parametrize("flags", [(), FLAGS], ids=["even", "uneven"])
def test_every_run_gives_the_same_bits(flags: tuple[str, ...]) -> None:
    case = random_flags(case_of(64, 500, prenorm=True, **MUON), 3, *flags)
    case = on_gpu(case, torch.bfloat16)
    first, second = gradients(case), gradients(case)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_one_pass_is_any_split() -> None:
    case = on_gpu(case_of(64, 300), torch.float32)
    pieces = outputs(*run_in_pieces(case, "triton", [1, 64, 70, 129, 250]))
    whole = {n: x.double() if x.is_floating_point() else x
             for n, x in outputs(*case.run("triton")).items()}  # fmt: skip
    errors = norm_errors(pieces, whole)
    assert all(error <= 1e-5 for error in errors.values()), errors  # other widths of products


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("flags", [(), ("mask",)], ids=["even", "masked"])
def test_call_without_documents_never_waits_for_the_gpu(flags: tuple[str, ...], name: str) -> None:
    case = on_gpu(random_flags(case_of(64, **FEATURES[name]), 3, *flags), torch.bfloat16)
    gradients(case)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def compiled() -> dict[str, int]:
    """How often each kernel has been compiled."""
    from lightning_modules.ops.lact.kernels import few, gates, tokens, update

    kernels = [
        getattr(module, name)
        for module in (few, gates, tokens, update)
        for name in dir(module)
        if name.endswith("_kernel")
    ]
    return {k.__name__: sum(len(c[0]) for c in k.device_caches.values()) for k in kernels}


@pytest.mark.parametrize("name", FEATURES)
def test_another_length_or_batch_compiles_nothing(name: str) -> None:
    def run(time: int, batch: int) -> None:
        case = case_of(64, time, batch=batch, **FEATURES[name])
        gradients(on_gpu(case, torch.bfloat16))

    run(200, 2)
    before = compiled()
    for time, batch in ((1, 1), (65, 1), (193, 3), (512, 16), (1000, 2)):
        run(time, batch)
    assert compiled() == before


def test_peak_memory_is_weights_and_a_few_copies_of_the_tokens() -> None:
    case = on_gpu(case_of(64, 2**15, 2048, heads=4, momentum=False), torch.bfloat16)
    leaves = {name: x.clone().requires_grad_() for name, x in case.tensors.items()}
    call: Callable[[], Any] = lambda: case.with_tensors(**leaves).run("triton")  # noqa: E731
    call()[0].float().sum().backward()
    for leaf in leaves.values():
        leaf.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()[0].sum().backward()
    tokens = 2 * leaves["q"].numel()
    # o, dq, dk, dv, k and v in slots, and what is read at once: 2 q, 6 hidden ones, all with D = F
    assert torch.cuda.max_memory_allocated() - before < 15 * tokens


def test_auto_is_triton_on_a_gpu_and_torch_where_kernels_end() -> None:
    case = on_gpu(case_of(64), torch.bfloat16)
    assert torch.equal(case.run("auto")[0], case.run("triton")[0])
    wide = case.with_tensors(lr=case.tensors["lr"].unsqueeze(-1).expand(-1, -1, -1, -1, 64))
    assert torch.equal(wide.run("auto")[0], wide.run("torch")[0])


def test_long_rows_are_gathered_past_two_billion_numbers() -> None:
    """Offsets in 64 bits: 2^31 numbers of a token tensor are 4 GiB of bfloat16."""
    from lightning_modules.ops.lact.walk import Block

    x = torch.zeros(1, 2**22 + 64, 2, 256, device="cuda", dtype=torch.bfloat16)
    x[:, -64:] = 1
    block = Block(0, 1, 64, 2**22, None, 0)
    assert bool((gather(x, None, block, x.dtype) == 1).all())
