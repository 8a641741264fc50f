"""Calls of the TTT ops that cannot be meant: an error that names the argument and the fix."""

from typing import Any

import pytest
import torch
from ttt_cases import LAYERS, Case, make_case

TENSORS = {
    "q": (2, 6, 8),
    "k": (2, 5, 2, 4),
    "v": (2, 6, 2, 5),
    "eta": (2, 6, 2, 1),
    "norm_weight": (8,),
    "norm_bias": (2, 1, 4),
}
OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "causal_without_size": ({"mini_batch_size": None}, "mini_batch_size"),
    "size_zero": ({"mini_batch_size": 0}, "mini_batch_size must be at least 1"),
    "size_negative": ({"mini_batch_size": -4}, "mini_batch_size must be at least 1"),
    "token_eta_too_long": ({"token_eta": torch.ones(5)}, "token_eta"),
    "token_eta_too_short": ({"token_eta": torch.ones(3)}, "token_eta"),
    "mask_of_one_row": ({"mask": torch.ones(6, dtype=torch.bool)}, "mask"),
    "mask_of_numbers": ({"mask": torch.ones(2, 6)}, "mask must be bool"),
    "write_mask_too_short": ({"write_mask": torch.ones(2, 5, dtype=torch.bool)}, "write_mask"),
    "write_mask_of_numbers": ({"write_mask": torch.ones(2, 6)}, "write_mask must be bool"),
    "document_ids_of_one_row": ({"document_ids": torch.ones(6, dtype=torch.int64)}, "document_ids"),
    "document_ids_real": ({"document_ids": torch.ones(2, 6)}, "document_ids must be integers"),
}


@pytest.fixture(params=LAYERS)
def causal(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param, time=6, mini_batch_size=4, causal=True)


def test_the_case_itself_runs(causal: Case) -> None:
    o, _ = causal.run("auto")
    assert o.shape == (2, 6, 2, 4)


@pytest.mark.parametrize("name", TENSORS)
def test_wrong_shape_names_the_tensor(name: str, causal: Case) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must"):
        causal.with_tensors(**{name: torch.ones(TENSORS[name])}).run("auto")


def test_wrong_weight_shape_names_the_weight(causal: Case) -> None:
    for name in LAYERS[causal.layer].weights:
        wrong = causal.tensors[name].expand(3, *causal.tensors[name].shape)  # 3 rows, not 2
        with pytest.raises(ValueError, match=rf"^{name} must have shape .* or "):
            causal.with_tensors(**{name: wrong}).run("auto")


def test_no_tokens_is_an_error(causal: Case) -> None:
    with pytest.raises(ValueError, match="T >= 1"):
        causal.tokens(slice(0, 0)).run("auto")


@pytest.mark.parametrize("mistake", OPTIONS)
def test_wrong_option_names_the_option(mistake: str, causal: Case) -> None:
    options, message = OPTIONS[mistake]
    with pytest.raises(ValueError, match=f"(?i){message}"):
        causal.run("auto", **options)


@pytest.mark.parametrize("mini_batch_size", [None, 4])
def test_token_eta_without_causal_says_where_factors_go(
    mini_batch_size: int | None, causal: Case
) -> None:
    with pytest.raises(ValueError, match=r"token_eta .* causal=False .* eta"):
        causal.run("auto", causal=False, mini_batch_size=mini_batch_size)


def test_unknown_backend_lists_the_known_ones(causal: Case) -> None:
    with pytest.raises(ValueError, match=r"'cuda'.*'auto'.*'naive'") as error:
        causal.run("cuda")
    assert "'torch'" in str(error.value)


def test_state_of_another_op_is_a_type_error(causal: Case) -> None:
    other = next(name for name in LAYERS if name != causal.layer)
    _, state = make_case(other, time=6, mini_batch_size=4, causal=True).run("auto")
    with pytest.raises(TypeError, match=type(state).__name__):
        causal.with_state(state).run("auto")


def test_state_of_another_mini_batch_size_names_both(causal: Case) -> None:
    _, state = causal.run("auto")
    larger = causal.with_tensors(token_eta=torch.ones(8, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"mini_batch_size=4.*=8"):
        larger.with_state(state).run("auto", mini_batch_size=8)


def test_state_of_a_causal_call_does_not_fit_one_that_is_not(causal: Case) -> None:
    _, state = causal.run("auto")
    blocks = causal.with_tensors(token_eta=None).with_state(state)
    with pytest.raises(ValueError, match=r"causal call with mini_batch_size=4.* not causal"):
        blocks.run("auto", causal=False)


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_call_that_is_not_causal_leaves_nothing_pending(backend: str, causal: Case) -> None:
    blocks = causal.with_tensors(token_eta=None)
    _, state = blocks.run(backend, causal=False)
    assert state.pending_k.shape == (2, 0, 2, 4)
    o, _ = blocks.with_state(state).run(backend, causal=False)
    assert o.shape == (2, 6, 2, 4)


def test_state_of_another_batch_names_the_field(causal: Case) -> None:
    _, state = causal.rows(slice(0, 1)).run("auto")
    with pytest.raises(ValueError, match=r"^state\.dw1? must have shape"):
        causal.with_state(state).run("auto")
