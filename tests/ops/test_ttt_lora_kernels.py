"""The Triton kernels of `ops.ttt_lora`, interpreted on the CPU, against the naive loop.

On a machine with a GPU they are compiled: `test_ttt_lora_kernels_gpu.py`.
"""

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton_interpreter as triton_interpreter
from torch.utils.checkpoint import checkpoint
from ttt_cases import assert_same, differentiate, outputs, random_flags, run_in_pieces
from ttt_lora_cases import FORMS, LoRACase, carried_state, case_of, make_case, with_everything

from lightning_modules.ops import triton_backend
from lightning_modules.ops.ttt_lora import ttt_lora_cell

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
every_form = pytest.mark.parametrize("form", FORMS)
two_forms = pytest.mark.parametrize("form", ["A_plain", "B_ln"])


def check_triton(case: LoRACase) -> None:
    expected, expected_gradients = differentiate(case, "naive")
    actual, gradients = differentiate(case, "triton")
    # both are float64; sums are taken in another order
    assert_same(actual, expected, 1e-10, "triton")
    assert_same(gradients, expected_gradients, 1e-9, "triton gradient of")


# Quick: every feature once


@pytest.mark.quick("A_plain")
@two_forms
def test_triton_is_naive_with_everything(form: str) -> None:
    case = case_of(form, 10, batch=2, mini_batch_size=3, size=3)
    check_triton(with_everything(case, seed=2))


@pytest.mark.quick("B_ln")
@two_forms
def test_triton_is_naive_without_masks_from_an_open_mini_batch(form: str) -> None:
    check_triton(carried_state(case_of(form, 9, batch=2, size=3), seed=1))


def test_triton_is_naive_in_tiles_of_unequal_sides() -> None:
    check_triton(case_of("B_plain", 5, batch=1, size=16))


def test_auto_on_a_cpu_is_torch_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    triton_backend._announce.cache_clear()
    case = make_case(time=9)
    with caplog.at_level(logging.INFO, logger=triton_backend.__name__):
        same = outputs(*case.run("torch")), outputs(*case.run("auto"))
        case.run("auto")
    assert_same(*same, 0, "auto")
    assert (
        len(caplog.messages) == 1 and "backend 'torch', as q is on the device 'cpu'" in caplog.text
    )


def test_triton_without_a_gpu_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match=r"q is on 'cpu': move.*TRITON_INTERPRET=1"):
        make_case(time=3).run("triton")


def test_triton_names_the_input_that_it_does_not_take() -> None:
    with pytest.raises(ValueError, match=r"takes q in .*float16: convert it, or use"):
        make_case(time=3, dtype=torch.float16).run("triton")
    with pytest.raises(ValueError, match=r"d = 65 is over 64: use"):
        make_case(time=3, size=65).run("triton")
    with pytest.raises(ValueError, match=r"mini_batch_size = 200 with d = 17 does not fit"):
        make_case(time=3, size=17, mini_batch_size=200).run("triton")


def test_second_derivatives_are_not_implemented() -> None:
    case = make_case(time=2, mini_batch_size=2, size=2, batch=1)
    q = case.tensors["q"].requires_grad_()
    o, _ = case.run("triton")
    with pytest.raises(NotImplementedError, match=r"no second derivatives.*'naive'"):
        torch.autograd.grad(o.sum(), q, create_graph=True)


def test_checkpointed_and_without_gradients_it_is_the_same() -> None:
    case = make_case(time=3, mini_batch_size=2, size=2, batch=1)
    expected, expected_gradients = differentiate(case, "triton")

    def recomputed(call: LoRACase) -> Any:
        return checkpoint(lambda: call.run("triton"), use_reentrant=False)

    actual, gradients = differentiate(case, recomputed)
    assert_same(actual, expected, 0, "checkpointed")
    assert_same(gradients, expected_gradients, 0, "checkpointed: gradient of")
    with torch.no_grad():
        assert_same(outputs(*case.run("triton")), expected, 0, "no_grad")


def cell(form: str, backend: str, residual: bool, width: int, mask: bool) -> list[torch.Tensor]:
    """Outputs, states and gradients of `ttt_lora_cell` in two calls."""
    (mode, loss), generator = FORMS[form], torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return x.requires_grad_()

    leaves = projected, gate, base, norm = normal(2, 7, width), normal(2), normal(2, 4, 3), None
    if loss == "ln" or residual:
        norm = normal(2, 2, 3)
        leaves = (*leaves[:3], norm)
    valid = torch.rand(2, 7, generator=generator) > 0.3 if mask else None
    options = {"mini_batch_size": 3, "mode": mode, "loss": loss, "norm": norm}
    state, parts = None, []
    for piece in (slice(0, 4), slice(4, 7)):
        flags = {"mask": None if valid is None else valid[:, piece], "state": state}
        given = (projected[:, piece], gate.sigmoid(), base)
        y, state = ttt_lora_cell(*given, **options, **flags, q_residual=residual, backend=backend)
        assert not y[..., 3:].any()
        parts.append(y[..., :3])
    assert state is not None
    results = [torch.cat(parts, 1), state.dw, state.db, state.pending_k, state.pending_v]
    loss_of_all = sum(x.sin().sum() for x in results)
    used = [x for x in leaves if x is not None]
    return [*results, *torch.autograd.grad(loss_of_all, used)]


def check_cell(form: str, *options: bool | int) -> None:
    pairs = zip(cell(form, "triton", *options), cell(form, "torch", *options), strict=True)
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)  # float64


def test_triton_cell_is_torch_cell() -> None:
    check_cell("A_plain", True, 24, True)


def test_calls_that_share_a_plan_are_calls_that_make_their_own() -> None:
    mask, shared = torch.tensor([[True, False, True, True, True]]), {}
    for size in (3, 2):  # two groups of one layer
        given = torch.randn(1, 5, 3 * size), torch.tensor([0.3]), torch.randn(1, size + 1, size)
        options = {"mini_batch_size": 2, "mask": mask, "backend": "triton"}
        own, own_state = ttt_lora_cell(*given, **options)
        o, state = ttt_lora_cell(*given, **options, shared=shared)
        assert_same(outputs(o, state), outputs(own, own_state), 0, "shared")
    assert len(shared) == 1


# Slow: every size and feature


@pytest.mark.slow
@every_form
def test_triton_is_naive_with_everything_in_a_group(form: str) -> None:
    case = case_of(form, 15, batch=3, group=2, mini_batch_size=3, size=3)
    check_triton(with_everything(case, seed=3))


@pytest.mark.slow
@two_forms
@pytest.mark.parametrize("options", [(False, 18, False), (True, 24, True)], ids=str)
def test_triton_cell_is_torch_cell_with_and_without_norm(
    options: tuple[bool, int, bool], form: str
) -> None:
    check_cell(form, *options)


@pytest.mark.slow
@every_form
@pytest.mark.parametrize("size, m", [(3, 4), (6, 8), (10, 16), (16, 4), (33, 8)])
def test_triton_is_naive_for_any_size(size: int, m: int, form: str) -> None:
    case = case_of(form, 2 * m + 3, mini_batch_size=m, batch=1, size=size)
    check_triton(case)
    check_triton(case.tokens(slice(0, 3)))


@pytest.mark.slow
@two_forms
@pytest.mark.parametrize("feature", ["mask", "document_ids", "state", "group", "eps", "no_adapt"])
def test_triton_is_naive_with_one_feature(feature: str, form: str) -> None:
    case = case_of(form, 13, batch=2, group=2 if feature == "group" else None)
    if feature in ("mask", "document_ids"):
        case = random_flags(case, 3, feature)
    elif feature == "state":
        case = carried_state(case, 4)
    elif feature in ("eps", "no_adapt"):
        option = {"eps": {"norm_eps": 0.1}, "no_adapt": {"adapt": False}}[feature]
        case = carried_state(case, 4).with_options(**option)
    check_triton(case)


@pytest.mark.slow
@every_form
@pytest.mark.parametrize("seed", range(2))
def test_triton_is_naive_with_dense_masks_and_documents(seed: int, form: str) -> None:
    # mini-batches of 12 are several blocks where only a fifth of the tokens exists
    size, share = ((3, 0.5), (12, 0.2))[seed]
    case = case_of(form, 40, batch=2, mini_batch_size=size, size=2, seed=seed)
    case = carried_state(case, seed)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, 40, generator=generator) < share
    ids = (torch.rand(2, 40, generator=generator) < 0.1).cumsum(1)
    check_triton(case.with_options(mask=mask))
    check_triton(case.with_options(mask=mask, document_ids=ids))


@pytest.mark.slow
@two_forms
@pytest.mark.parametrize("eta", ["all", "adapter", "token"])
def test_triton_is_naive_for_any_shape_of_eta(eta: str, form: str) -> None:
    check_triton(carried_state(case_of(form, 6, group=2, eta=eta), seed=1))


@pytest.mark.slow
@two_forms
def test_one_pass_is_a_split(form: str) -> None:
    case = with_everything(case_of(form, 8, batch=2, mini_batch_size=3, size=2), seed=2)
    expected, expected_gradients = differentiate(case, "triton")
    for cuts in ([1], [3], [2, 5], [4, 7]):

        def in_pieces(call: LoRACase, at: list[int] = cuts) -> Any:
            return run_in_pieces(call, "triton", at)

        pieces, gradients = differentiate(case, in_pieces)
        assert_same(pieces, expected, 1e-11, f"cut at {cuts}")
        assert_same(gradients, expected_gradients, 1e-10, f"cut at {cuts}: gradient of")


@pytest.mark.slow
@every_form
def test_float32_is_close_to_naive_float64(form: str) -> None:
    case = with_everything(case_of(form, 35, batch=2), seed=1)
    single = replace(
        case,
        tensors={name: x.float() for name, x in case.tensors.items()},
        state=type(case.state)(*(x.float() if x.is_floating_point() else x for x in case.state)),
    )
    expected, expected_gradients = differentiate(case, "naive")
    actual, gradients = differentiate(single, "triton")
    as_double = {n: x.double() if x.is_floating_point() else x for n, x in actual.items()}
    # float32 has 6e-8; the bounds are those of the torch backend
    assert_same(as_double, expected, 2e-5, "triton")
    assert_same({n: x.double() for n, x in gradients.items()}, expected_gradients, 5e-5, "triton")


@pytest.mark.slow
@two_forms
def test_row_of_padding_keeps_its_state_bit_for_bit(form: str) -> None:
    case = carried_state(case_of(form, 12, batch=3), seed=1)
    mask = torch.tensor([[True], [False], [False]]).expand(3, 12)
    _, state = case.with_options(mask=mask).run("triton")
    for name, value in case.state._asdict().items():
        assert torch.equal(getattr(state, name)[1:], value[1:]), name


@pytest.mark.slow
@two_forms
def test_what_masked_tokens_would_write_is_never_looked_at(form: str) -> None:
    case = with_everything(case_of(form, 9, batch=2), seed=5)
    mask, ids = case.options["mask"], case.options["document_ids"]
    poisoned = {name: case.tensors[name].clone() for name in ("k", "v", "eta")}
    for value in poisoned.values():
        value[~mask] = float("nan")
    expected, expected_gradients = differentiate(case, "triton")
    other_ids = torch.where(mask, ids, 12345)
    changed = case.with_tensors(**poisoned).with_options(document_ids=other_ids)
    actual, gradients = differentiate(changed, "triton")
    assert_same(actual, expected, 0, "triton")
    assert_same(gradients, expected_gradients, 0, "triton gradient of")
    assert not any(gradients[name][~mask].any() for name in poisoned)
