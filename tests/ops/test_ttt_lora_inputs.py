"""Calls of `ops.ttt_lora` that cannot be meant: an error that names the argument and the fix."""

from typing import Any

import pytest
import torch
from ttt_cases import make_case as make_ttt_case
from ttt_lora_cases import LoRACase, make_case

from lightning_modules.ops.ttt_lora import inner_loss

TENSORS = {
    "q": (6, 4),
    "k": (2, 5, 4),
    "v": (2, 6, 5),
    "eta": (2, 6, 1),
    "w_base": (2, 4, 4),
    "b_base": (1, 4),
    "norm_weight": (5,),
    "norm_bias": (2, 4),
}
GROUP_TENSORS = {
    "k": (2, 6, 4),
    "eta": (2, 6),
    "w_base": (4, 4),
    "b_base": (3, 1, 4),
    "norm_weight": (4,),
    "norm_bias": (2, 4),
}
OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "size_zero": ({"mini_batch_size": 0}, "mini_batch_size must be at least 1"),
    "mode_of_updated_weights": ({"mode": "C"}, "mode must be 'A' .* read the future"),
    "loss_of_another_name": ({"loss": "mse"}, "loss must be 'plain' or 'ln'"),
    "ln_without_weight": ({"norm_weight": None}, "loss='ln' needs norm_weight"),
    "ln_without_bias": ({"norm_bias": None}, "loss='ln' needs norm_bias"),
    "norm_of_plain": ({"loss": "plain"}, "norm_weight belongs to loss='ln'.* None"),
    "mask_of_one_row": ({"mask": torch.ones(6, dtype=torch.bool)}, "mask must have shape"),
    "mask_of_numbers": ({"mask": torch.ones(2, 6)}, "mask must be bool"),
    "document_ids_real": ({"document_ids": torch.ones(2, 6)}, "document_ids must be integers"),
    "document_ids_short": (
        {"document_ids": torch.ones(2, 5, dtype=torch.int64)},
        "document_ids must have shape",
    ),
}


@pytest.fixture
def case() -> LoRACase:
    return make_case(time=6, loss="ln")


def test_the_cases_themselves_run(case: LoRACase) -> None:
    assert case.run("auto")[0].shape == (2, 6, 4)
    o, state = make_case(time=6, group=3).run("auto")
    assert o.shape == (2, 6, 3, 4)
    assert state.dw.shape == (2, 3, 4, 4)


@pytest.mark.parametrize("name", TENSORS)
def test_wrong_shape_names_the_tensor(name: str, case: LoRACase) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must"):
        case.with_tensors(**{name: torch.ones(TENSORS[name])}).run("auto")


@pytest.mark.parametrize("name", GROUP_TENSORS)
def test_wrong_shape_in_a_group_names_the_tensor(name: str) -> None:
    group = make_case(time=6, loss="ln", group=3)
    with pytest.raises(ValueError, match=rf"^{name} must have shape"):
        group.with_tensors(**{name: torch.ones(GROUP_TENSORS[name])}).run("auto")


@pytest.mark.parametrize("mistake", OPTIONS)
def test_wrong_option_names_the_option(mistake: str, case: LoRACase) -> None:
    options, message = OPTIONS[mistake]
    with pytest.raises(ValueError, match=message):
        case.run("auto", **options)


def test_no_tokens_and_integers_are_errors(case: LoRACase) -> None:
    with pytest.raises(ValueError, match="T >= 1"):
        case.tokens(slice(0, 0)).run("auto")
    with pytest.raises(ValueError, match="q must be floating point"):
        case.with_tensors(q=torch.ones(2, 6, 4, dtype=torch.int64)).run("auto")


def test_unknown_backend_lists_the_known_ones(case: LoRACase) -> None:
    with pytest.raises(ValueError, match=r"ttt_lora .*'cuda'.*'auto', 'torch', 'triton', 'naive'"):
        case.run("cuda")


def test_state_of_another_op_is_a_type_error(case: LoRACase) -> None:
    _, state = make_ttt_case("linear", time=6, mini_batch_size=4, causal=True).run("auto")
    with pytest.raises(TypeError, match="TTTLoRAState, but is a TTTLinearState"):
        case.with_state(state).run("auto")


def test_state_of_another_call_names_what_differs(case: LoRACase) -> None:
    _, state = case.run("auto")
    with pytest.raises(ValueError, match=r"mini_batch_size=4.*=8.*state=None"):
        case.with_state(state).run("auto", mini_batch_size=8)
    with pytest.raises(ValueError, match=r"^state\.dw must have shape"):
        case.rows(slice(0, 1)).with_state(state).run("auto")
    group = make_case(time=6, group=3)
    with pytest.raises(ValueError, match=r"^state\.dw must have shape \[2, 3, 4, 4\]"):
        group.with_state(state).run("auto")


def test_inner_loss_wants_the_norm_of_its_loss(case: LoRACase) -> None:
    k, v, w, b = (case.tensors[name] for name in ("k", "v", "w_base", "b_base"))
    with pytest.raises(ValueError, match="loss='ln' needs norm_weight"):
        inner_loss(k, v, w, b, loss="ln")
    with pytest.raises(ValueError, match="norm_bias belongs to loss='ln'"):
        inner_loss(k, v, w, b, norm_bias=b)


def test_inner_loss_of_half_precision_is_that_of_float32_under_autocast() -> None:
    case = make_case(time=6, loss="ln", group=2, dtype=torch.bfloat16)
    names = ("k", "v", "w_base", "b_base", "norm_weight", "norm_bias")

    def found(dtype: torch.dtype) -> torch.Tensor:
        k, v, w, b, gamma, beta = (case.tensors[name].to(dtype) for name in names)
        return inner_loss(k, v, w, b, loss="ln", norm_weight=gamma, norm_bias=beta)

    with torch.autocast("cpu", torch.bfloat16):
        half = found(torch.bfloat16)
    assert half.dtype == torch.float32
    assert torch.equal(half, found(torch.float32))
