"""LaCT refuses what does not fit together, and says what to pass instead."""

from typing import Any

import pytest
import torch
from lact_cases import Case, make_case

from lightning_modules.ops import TTTLinearState

TENSORS = {
    "q": [(2, 6, 4), (2, 0, 2, 4)],
    "k": [(2, 5, 2, 4), (2, 6, 1, 4)],
    "v": [(2, 6, 2, 3)],
    "lr": [(2, 6, 2), (2, 6, 2, 2), (2, 6, 2, 3, 5), (2, 5, 2, 3)],
    "momentum": [(2, 6), (2, 6, 2, 1), (2, 5, 2)],
    "w0": [(2, 6, 4), (0, 2, 6, 4), (1, 3, 6, 4), (1, 2, 6, 3), (1, 2, 0, 4)],
    "w1": [(1, 2, 6, 4), (2, 2, 4, 6)],
    "w2": [(1, 2, 4, 6), (2, 2, 6, 4)],
}
OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "chunk_size_zero": ({"chunk_size": 0}, "chunk_size must be at least 1"),
    "chunk_size_negative": ({"chunk_size": -4}, "chunk_size must be at least 1"),
    "muon_dtype_integer": (
        {"muon": True, "muon_dtype": torch.int32},
        "muon_dtype must be floating point",
    ),
    "mask_of_one_row": ({"mask": torch.ones(6, dtype=torch.bool)}, "mask must have shape"),
    "mask_of_numbers": ({"mask": torch.ones(2, 6)}, r"mask must be bool.*mask\.bool\(\)"),
    "document_ids_of_one_row": ({"document_ids": torch.ones(6, dtype=torch.int64)}, "document_ids"),
    "document_ids_real": ({"document_ids": torch.ones(2, 6)}, "document_ids must be integers"),
    "document_ids_bool": (
        {"document_ids": torch.ones(2, 6, dtype=torch.bool)},
        "document_ids must be integers",
    ),
    "backend": ({"backend": "cuda"}, r"'cuda'.*'auto'.*'torch'.*'naive'"),
}


@pytest.fixture
def case() -> Case:
    return make_case(time=6, chunk_size=4)


def call(case: Case, **options: Any) -> Any:
    return case.run(options.pop("backend", "auto"), **options)


def test_the_case_itself_runs(case: Case) -> None:
    o, state = call(case)
    assert o.shape == (2, 6, 2, 4)
    call(case.with_state(state))


@pytest.mark.parametrize(
    ("name", "shape"), [(n, x) for n, shapes in TENSORS.items() for x in shapes]
)
def test_wrong_shape_names_the_tensor(name: str, shape: tuple[int, ...], case: Case) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must"):
        call(case.with_tensors(**{name: torch.ones(shape)}))


def test_weights_without_an_axis_of_blocks_say_how_to_add_it(case: Case) -> None:
    with pytest.raises(ValueError, match=r"w0\[None\]"):
        call(case.with_tensors(w0=case.tensors["w0"][0]))


def test_integer_queries_are_an_error(case: Case) -> None:
    with pytest.raises(ValueError, match="q must be floating point"):
        call(case.with_tensors(q=case.tensors["q"].long()))


def test_rate_per_channel_needs_as_many_hidden_channels(case: Case) -> None:
    with pytest.raises(ValueError, match=r"lr per channel.*D = 4.*has 6.*\[B, T, H, 3\]"):
        call(case.with_tensors(lr=torch.ones(2, 6, 2, 3, 4)))


@pytest.mark.parametrize("mistake", OPTIONS)
def test_wrong_option_names_the_option(mistake: str, case: Case) -> None:
    options, message = OPTIONS[mistake]
    with pytest.raises(ValueError, match=message):
        call(case, **options)


def test_state_of_another_op_is_a_type_error(case: Case) -> None:
    with pytest.raises(TypeError, match="must be a LaCTState, but is a TTTLinearState"):
        call(case, state=TTTLinearState(*[torch.zeros(2)] * 8))


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "chunk_size": ({"chunk_size": 3}, r"another chunk_size.*, 3, but this one has 4"),
    "blocks": ({"blocks": 2}, "another blocks, 2, but this one has 1"),
    "batch": ({"batch": 3}, "another batch size, 3, but this one has 2"),
    "prenorm": ({"prenorm": True}, "another prenorm, True, but this one has False"),
    "momentum": ({"momentum": False}, "another momentum, False, but this one has True"),
    "heads": ({"heads": 1}, r"^state\.w0 must have shape"),
    "hidden": ({"hidden": 5}, r"^state\.w0 must have shape"),
    "size": ({"size": 3}, r"^state\.w0 must have shape"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_state_of_another_call_names_the_difference_and_the_fix(name: str, case: Case) -> None:
    options, message = OTHERS[name]
    _, state = call(make_case(**{"time": 6, "chunk_size": 4, **options}))
    with pytest.raises(ValueError, match=message) as error:
        call(case.with_state(state))
    if message.startswith("another"):
        assert "or start with state=None" in str(error.value)


def test_state_of_rates_per_channel_needs_such_rates() -> None:
    channels = make_case(time=6, chunk_size=4, hidden=4, per_channel=True)
    heads = make_case(time=6, chunk_size=4, hidden=4)
    with pytest.raises(ValueError, match="another lr per channel, True, but this one has False"):
        call(heads.with_state(call(channels)[1]))
    with pytest.raises(ValueError, match="another lr per channel, False, but this one has True"):
        call(channels.with_state(call(heads)[1]))


def test_every_field_of_a_state_is_checked(case: Case) -> None:
    _, state = call(case)
    for name, x in state._asdict().items():
        broken = state._replace(**{name: torch.zeros(*x.shape, 2)})
        with pytest.raises(ValueError, match=f"state.* {name} |state.{name} |another"):
            call(case.with_state(broken))
