"""Calls of the In-Place op that cannot be meant: an error that names the argument and the fix."""

from typing import Any

import pytest
import torch
from in_place_cases import Case, make_case, run_in_pieces
from ttt_cases import make_case as make_ttt_case

TENSORS = {
    "z": (6, 7),
    "v": (2, 5, 5),
    "w_down": (7, 5),
    "eta": (2, 6, 1),
}
OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "size_zero": ({"chunk_size": 0}, "chunk_size must be at least 1"),
    "clip_zero": ({"clip": 0.0}, "clip must be positive.*None"),
    "clip_negative": ({"clip": -1.0}, "clip must be positive"),
    "mask_of_one_row": ({"mask": torch.ones(6, dtype=torch.bool)}, "mask"),
    "mask_of_numbers": ({"mask": torch.ones(2, 6)}, "mask must be bool"),
    "document_ids_of_one_row": ({"document_ids": torch.ones(6, dtype=torch.int64)}, "document_ids"),
    "document_ids_real": ({"document_ids": torch.ones(2, 6)}, "document_ids must be integers"),
}


@pytest.fixture
def case() -> Case:
    return make_case(time=6, chunk_size=4)


def test_the_case_itself_runs(case: Case) -> None:
    o, _ = case.run("auto")
    assert o.shape == (2, 6, 5)


@pytest.mark.parametrize("name", TENSORS)
def test_wrong_shape_names_the_tensor(name: str, case: Case) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must"):
        case.with_tensors(**{name: torch.ones(TENSORS[name])}).run("auto")


def test_no_tokens_is_an_error(case: Case) -> None:
    with pytest.raises(ValueError, match="T >= 1"):
        case.tokens(slice(0, 0)).run("auto")


def test_integers_are_an_error(case: Case) -> None:
    with pytest.raises(ValueError, match="z must be floating point"):
        case.with_tensors(z=torch.ones(2, 6, 7, dtype=torch.int64)).run("auto")


def test_weight_of_another_dtype_names_both_and_autocast(case: Case) -> None:
    with pytest.raises(ValueError, match=r"w_down must .*float64.*float32.*autocast"):
        case.with_tensors(w_down=case.tensors["w_down"].float()).run("auto")


@pytest.mark.parametrize("mistake", OPTIONS)
def test_wrong_option_names_the_option(mistake: str, case: Case) -> None:
    options, message = OPTIONS[mistake]
    with pytest.raises(ValueError, match=f"(?i){message}"):
        case.run("auto", **options)


def test_unknown_backend_lists_the_known_ones(case: Case) -> None:
    with pytest.raises(ValueError, match=r"'cuda'.*'auto', 'torch', 'naive'"):
        case.run("cuda")


def test_state_of_another_op_is_a_type_error(case: Case) -> None:
    _, state = make_ttt_case("linear", time=6, mini_batch_size=4, causal=True).run("auto")
    with pytest.raises(TypeError, match="InPlaceState.*TTTLinearState"):
        case.run("auto", state=state)


def test_state_of_another_batch_names_the_field(case: Case) -> None:
    _, state = case.rows(slice(0, 1)).run("auto")
    with pytest.raises(ValueError, match=r"^state\.dw must have shape"):
        case.with_state(state).run("auto")


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_eta_may_be_a_number_a_scalar_or_one_for_each_token(backend: str, case: Case) -> None:
    kinds = [0.25, torch.tensor(0.25), torch.full((2, 6), 0.25)]
    runs = [case.with_tensors(eta=eta).run(backend) for eta in kinds if torch.is_tensor(eta)]
    tensors = {name: x for name, x in case.tensors.items() if name != "eta"}
    runs.append(Case({**tensors, "eta": 0.25}, case.options).run(backend))
    for o, state in runs[1:]:
        assert torch.equal(o, runs[0][0]) and torch.equal(state.pending_dw, runs[0][1].pending_dw)


def test_the_last_of_one_token_calls_needs_no_earlier_tokens(case: Case) -> None:
    o, state = run_in_pieces(case, "auto", [1, 2, 3, 4, 5])
    assert o.shape == (2, 6, 5) and (state.pending_count == 2).all()
