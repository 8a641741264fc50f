"""Every backend of LaCT against the published implementation (tests/oracles/lact_op)."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import ORACLES, assert_close_to_oracle, load_oracle
from lact_cases import BACKENDS, INPUTS, WEIGHTS, Case
from torch import Tensor
from ttt_cases import assert_same, outputs

from lightning_modules.ops.states import LaCTState

FILES = sorted(file.stem for file in (ORACLES / "lact_op").glob("*.safetensors"))
KINDS = {
    "op": [name for name in FILES if name.startswith(("post_", "pre_"))],
    "stacked": [name for name in FILES if name.startswith("stack_")],
    "documents": [name for name in FILES if name.startswith("docs_")],
    "streaming": [name for name in FILES if name.startswith("stream_")],
}
BFLOAT16 = ["post_mom_muon_bf16", "post_nomom_muon_bf16"]
ONE_CALL = [
    name for kind in ("op", "stacked", "documents") for name in KINDS[kind] if name not in BFLOAT16
]
DTYPES = {"float64": torch.float64, "float32": torch.float32}
PENDING = ("pending_k", "pending_v", "pending_lr", "pending_momentum")


def read_oracle(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A file, with what has an axis of blocks as the op has it: `[r, ...]`, or `[B, r, ...]`."""
    data, about = load_oracle(f"lact_op/{name}")
    for key, value in data.items():
        prefix, _, field = key.rpartition("/")
        if field.startswith(("w", "momentum_w", "norm_w")):
            carried = prefix not in ("", "grad")
            data[key] = value.unsqueeze(0) if about["r"] == 1 else value
            data[key] = data[key].transpose(0, 1) if carried else data[key]
    return data, about


def oracle_case(data: dict[str, Tensor], about: dict[str, Any], dtype: torch.dtype) -> Case:
    """The call that an oracle file describes, with leaves that ask for gradients."""
    names = [*INPUTS, *(["momentum"] if about["momentum"] else [])]
    muon_dtype = torch.bfloat16 if about["muon_dtype"] == "bfloat16" else dtype
    options = {name: about[name] for name in ("chunk_size", "muon", "prenorm", "residual")}
    options["muon_dtype"] = muon_dtype
    if "document_ids" in data:
        options["document_ids"] = data["document_ids"]
    return Case({name: data[name].to(dtype).requires_grad_() for name in names}, options)


def tolerances(about: dict[str, Any], dtype: torch.dtype) -> tuple[float, float]:
    """Of outputs and of gradients; the files say why they are what they are."""
    suffix = "" if dtype == torch.float64 else "_float32"
    return about[f"tolerance{suffix}"], about[f"tolerance_grad{suffix}"]


def oracle_fields(data: dict[str, Tensor], prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Field of `LaCTState` -> value, for a state in a file; `counters` comes as it is."""
    for key, value in data.items():
        before, _, name = key.rpartition("/")
        if before == prefix:
            yield f"main_{name[:2]}" if name.endswith("_main") else name, value


def oracle_state(data: dict[str, Tensor], prefix: str, chunk_size: int) -> LaCTState:
    """A state in a file as the op takes it."""
    fields = dict(oracle_fields(data, prefix))
    rows = len(fields["w0"])
    for name in PENDING:
        kept = fields[name]
        fields[name] = kept.new_zeros(rows, chunk_size, *kept.shape[2:])
        fields[name][:, : kept.shape[1]] = kept
    tokens, updates, pending = (x.expand(rows).long() for x in fields.pop("counters"))
    fields |= {f"main_{name}": fields.get(f"main_{name}", fields[name][:, :0]) for name in WEIGHTS}
    document = torch.zeros_like(tokens)
    return LaCTState(
        **fields,
        pending_count=pending,
        updates=updates,
        tokens_seen=tokens,
        document_id=document,
    )


def check_state(state: LaCTState, data: dict[str, Tensor], prefix: str, tolerance: float) -> None:
    """Assert that a state equals the one in a file, in every field that the file has."""
    compared = 0
    for name, expected in oracle_fields(data, prefix):
        compared += 1
        if name == "counters":
            for row in zip(state.tokens_seen, state.updates, state.pending_count, strict=True):
                assert torch.equal(torch.stack(row), expected), f"{prefix}/counters: {row}"
            continue
        actual = getattr(state, name)
        if name in PENDING:
            filled = expected.shape[1]
            assert not actual[:, filled:].any(), f"{prefix}/{name}: not zero behind its tokens"
            actual = actual[:, :filled]
        assert_close_to_oracle(actual, expected, tolerance, f"{prefix}/{name}")
    assert compared > 0


def check_gradients(case: Case, data: dict[str, Tensor], o: Tensor, tolerance: float) -> None:
    loss = (o * data["grad_out"].to(o.dtype)).sum()
    leaves = list(case.tensors.values())
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    for (name, leaf), gradient in zip(case.tensors.items(), gradients, strict=True):
        gradient = torch.zeros_like(leaf) if gradient is None else gradient
        assert_close_to_oracle(gradient, data[f"grad/{name}"], tolerance, f"grad/{name}")
    assert len(leaves) == sum(key.startswith("grad/") for key in data)


def check_one_call(name: str, backend: str, dtype: torch.dtype) -> None:
    data, about = read_oracle(name)
    case = oracle_case(data, about, dtype)
    tolerance, tolerance_grad = tolerances(about, dtype)
    o, state = case.run(backend)
    assert_close_to_oracle(o, data["out"], tolerance, "out")
    if about["kind"] != "documents":
        check_state(state, data, "final", tolerance)
        assert (state.updates == about["num_updates"]).all()
    check_gradients(case, data, o, tolerance_grad)


@pytest.mark.quick("*-float64-torch", "post_mom_C5_T17-*", "*_muon_*-float64-naive")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ONE_CALL)
def test_one_call_matches_lact_and_autograd(name: str, dtype: str, backend: str) -> None:
    check_one_call(name, backend, DTYPES[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16_muon_matches_lact_up_to_its_own_rounding(name: str, backend: str) -> None:
    """The files' tolerances are twice the noise of bfloat16 that they measured."""
    check_one_call(name, backend, torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BFLOAT16)
def test_muon_in_float64_matches_lact_without_its_cast(name: str, backend: str) -> None:
    data, about = read_oracle(name)
    o, _ = oracle_case(data, about, torch.float64).run(backend, muon_dtype=torch.float64)
    expected = data["out_float64_newton_schulz"]
    # 1e-9 is what the files allow in float64 where nothing is rounded to bfloat16
    assert_close_to_oracle(o, expected, 1e-9, "out_float64_newton_schulz")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KINDS["streaming"])
def test_pieces_match_lact_in_one_pass(name: str, dtype: str, backend: str) -> None:
    """Outputs, the state after every piece, and gradients through the carried states."""
    data, about = read_oracle(name)
    case = oracle_case(data, about, DTYPES[dtype])
    tolerance, tolerance_grad = tolerances(about, DTYPES[dtype])
    parts, state = [], None
    for start, stop in pairwise([0, *about["splits"], about["seq_len"]]):
        o, state = case.tokens(slice(start, stop)).with_state(state).run(backend)
        prefix = "final" if stop == about["seq_len"] else f"state_{stop}"
        check_state(state, data, prefix, tolerance)
        parts.append(o)
    o = torch.cat(parts, dim=1)
    assert_close_to_oracle(o, data["out"], tolerance, "out")
    check_gradients(case, data, o, tolerance_grad)


def carried(name: str) -> list[str]:
    """The states in a file that a call can continue to its end, and `final`."""
    prefixes = {key.split("/")[0] for key in read_oracle(name)[0] if key.endswith("/counters")}
    return sorted(prefixes)


CARRIED = [(name, prefix) for name in KINDS["streaming"] for prefix in carried(name)]
CONTINUED = [(name, prefix) for name, prefix in CARRIED if not prefix.startswith("final")]
WRITTEN = [(name, prefix) for name, prefix in CARRIED if prefix.endswith("_eager")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "prefix"), CONTINUED)
def test_published_state_continues_to_the_published_end(
    name: str, prefix: str, dtype: str, backend: str
) -> None:
    """From either form: with a full chunk pending, or already written and nothing pending."""
    data, about = read_oracle(name)
    tolerance, _ = tolerances(about, DTYPES[dtype])
    start = int(prefix.split("_")[1])
    state = oracle_state(data, prefix, about["chunk_size"])
    cast = [x.to(DTYPES[dtype]) if x.is_floating_point() else x for x in state]
    case = oracle_case(data, about, DTYPES[dtype]).tokens(slice(start, None))
    o, state = case.with_state(LaCTState(*cast)).run(backend)
    assert_close_to_oracle(o, data["out"][:, start:], tolerance, "out")
    check_state(state, data, "final", tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "prefix"), WRITTEN)
def test_next_token_turns_the_pending_form_into_the_written_one(
    name: str, prefix: str, backend: str
) -> None:
    """Both forms, one token later, are the same state, and its weights are the written ones."""
    data, about = read_oracle(name)
    case = oracle_case(data, about, torch.float64).tokens(slice(0, 1))
    written = {key: x for key, x in data.items() if "pending" not in key}
    written[f"{prefix}/counters"] = data[f"{prefix}/counters"] + torch.tensor([1, 0, 1])
    results = []
    for form in (prefix, prefix.removesuffix("_eager")):
        state = oracle_state(data, form, about["chunk_size"])
        o, state = case.with_state(state).run(backend)
        check_state(state, written, prefix, 1e-9)  # the files' tolerance in float64
        results.append(outputs(o, state))
    assert_same(results[1], results[0], 1e-9, backend)


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_of_a_kind_is_run(kind: str) -> None:
    assert KINDS[kind], f"no file of kind {kind}"
    for name in KINDS[kind]:
        assert load_oracle(f"lact_op/{name}")[1]["kind"] == kind


def test_every_file_and_state_of_the_oracle_folder_is_run() -> None:
    assert len(FILES) == 28
    assert sorted(name for names in KINDS.values() for name in names) == FILES
    assert sorted([*ONE_CALL, *BFLOAT16, *KINDS["streaming"]]) == FILES
    assert len(CARRIED) == 19
    lazy = {pair for pair in CARRIED if not pair[1].endswith("_eager")}
    split = [(n, f"state_{t}") for n in KINDS["streaming"] for t in read_oracle(n)[1]["splits"]]
    assert lazy == {*split, *((name, "final") for name in KINDS["streaming"])}
    assert {*CONTINUED, *WRITTEN} | {pair for pair in lazy if pair[1] == "final"} == {*CARRIED}
