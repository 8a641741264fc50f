"""TTTLoRACell in a TTTLoraLinear: independent loops (oracles), siblings one by one, the size."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import ORACLES, load_oracle
from torch import Tensor, nn
from ttt_lora_cases import FORMS

from lightning_modules.adapters.ttt_lora.layer import SiblingGroup, TTTLoraLinear
from lightning_modules.layers.deep_context import DeepContext
from lightning_modules.layers.ttt_lora import (
    TTTLoRACell,
    TTTLoRAOptions,
    project,
    read_and_learn,
)
from lightning_modules.layers.ttt_lora_size import match_lora, parameter_count
from lightning_modules.ops import TTTLoRAState
from lightning_modules.streams import FastState

NAMES = {
    "theta_k.weight": "theta_k.weight",
    "theta_q.weight": "theta_q.weight",
    "theta_v.weight": "theta_v.weight",
    "theta_out.weight": "theta_out.weight",
    "norm.weight": "ln.weight",
    "norm.bias": "ln.bias",
    "w_base": "W_base",
    "b_base": "b_base",
    "lr_gate": "lr_gate",
}
"""Parameters of a cell -> their names in the oracles."""


def fits(about: dict[str, Any]) -> bool:
    """Normalised, and masked tokens (if any) take no slot: what the layer offers."""
    positional = about["mask_slots"].startswith("positional")
    return about["l2norm_qk"] and not (positional and about["masked"] != "none")


FILES = sorted(file.stem for file in (ORACLES / "ttt_lora").glob("*.safetensors"))
OFFERED = [file for file in FILES if fits(load_oracle(f"ttt_lora/{file}")[1])]


def test_all_files_but_those_of_what_the_layer_does_not_offer_are_run() -> None:
    left_out = {file.split("_", 1)[1] for file in set(FILES) - set(OFFERED)}
    assert len(FILES) == 32 and len(OFFERED) == 24
    assert left_out == {
        "plain_right_padded",  # positional masks: compared in tests/ops
        "ln_random_mask",
        "ln_initial_state_masked",
        "plain_no_l2norm_no_out_norm",
    }


def oracle_layer(data: dict[str, Tensor], about: dict[str, Any]) -> TTTLoraLinear:
    """A linear layer with one adapter and the weights of a file, as a decoder layer has it."""
    out_features, in_features = data["base.weight"].shape
    linear = nn.Linear(in_features, out_features, bias="base.bias" in data).double()
    options = TTTLoRAOptions(
        mini_batch_size=about["mini_batch"],
        mode=about["mode"][0],
        loss=about["inner_loss"],
        output_norm=about["output_norm"],
        q_residual=about["q_residual"],
        scaling=about["scaling"],
    )
    layer = TTTLoraLinear(linear)
    layer.add("default", len(data["b_base"]), options)
    cell = layer.ttt_lora_cells["default"]
    assert isinstance(cell, TTTLoRACell)
    with torch.no_grad():
        for name, parameter in cell.named_parameters():
            parameter.copy_(data[NAMES[name]])
        for name, parameter in linear.named_parameters():
            parameter.copy_(data[f"base.{name}"])
    cell.norm.eps = about["ln_eps"]
    layer.ttt_lora_places["default"] = (SiblingGroup("layer", [cell], DeepContext()), 0)
    return layer


def initial_state(data: dict[str, Tensor], leaves: dict[str, Tensor], size: int) -> FastState:
    if "initial_delta_W" not in data:
        return FastState()
    dw, db = (data[f"initial_delta_{name}"].clone().requires_grad_() for name in "Wb")
    leaves |= {"initial_delta_W": dw, "initial_delta_b": db}
    batch, d = db.shape
    none = torch.zeros(batch, dtype=torch.int64)
    kv = dw.new_zeros(batch, size, 1, d)
    pending = (kv, kv, kv[..., 0], none, none, none)
    state = TTTLoRAState(dw.unsqueeze(1), db.unsqueeze(1), *pending)
    return FastState({"layer": state._asdict()})


def run(file: str, pieces: bool) -> tuple[dict[str, Any], dict[str, Tensor], Tensor, TTTLoRAState]:
    """Options, leaves by their names in the file, output and last state."""
    data, about = load_oracle(f"ttt_lora/{file}")
    layer = oracle_layer(data, about)
    x = data["x"].clone().requires_grad_()
    leaves = {"x": x, **{f"base.{n}": p for n, p in layer.base_layer.named_parameters()}}
    cell = layer.ttt_lora_cells["default"]
    leaves |= {NAMES[name]: parameter for name, parameter in cell.named_parameters()}
    handle = initial_state(data, leaves, about["mini_batch"])
    group, _ = layer.ttt_lora_places["default"]
    splits = data["stream_splits"].tolist() if pieces else [0, x.shape[1]]
    parts = []
    for index, (start, stop) in enumerate(pairwise(splits)):
        handle = handle.advance() if index else handle
        mask = data["mask"][:, start:stop] if "mask" in data else None
        group.context.enter(handle, mask)
        parts.append(layer(x[:, start:stop]))
    state = handle.advance().read("layer", TTTLoRAState)
    assert state is not None
    return {"data": data, "about": about}, leaves, torch.cat(parts, dim=1), state


def assert_close(actual: Tensor, reference: Tensor, about: dict[str, Any], name: str) -> None:
    """The tolerances are the file's, for float64 loops in another order."""
    scale = reference.abs().max().item() if reference.numel() else 0.0
    error = (actual - reference).abs().max().item() if reference.numel() else 0.0
    assert actual.shape == reference.shape, name
    assert error <= about["rtol"] * scale + about["atol"], f"{name}: {error:.3g} of {scale:.3g}"


@pytest.mark.parametrize("pieces", [False, True], ids=["one_pass", "split"])
@pytest.mark.parametrize("file", OFFERED)
def test_output_state_and_every_gradient_match_the_independent_loop(
    file: str, pieces: bool
) -> None:
    given, leaves, y, state = run(file, pieces)
    data, about = given["data"], given["about"]
    assert_close(y, data["y"], about, "y")
    assert_close(state.dw[:, 0], data["final_delta_W"], about, "final_delta_W")
    assert_close(state.db[:, 0], data["final_delta_b"], about, "final_delta_b")
    assert torch.equal(state.pending_count, data["pending_count"])
    losses = {
        "grad": (y * data["grad_out"]).sum(),
        "grad_state": (state.dw[:, 0] * data["grad_final_delta_W"]).sum(),
    }
    for prefix, loss in losses.items():
        named = {name for name in data if name.startswith(f"{prefix}/")}
        assert named == {f"{prefix}/{name}" for name in leaves}
        found: Any = [None] * len(leaves)
        if loss.requires_grad:
            options = {"allow_unused": True, "retain_graph": True}
            found = torch.autograd.grad(loss, list(leaves.values()), **options)
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True):
            got = torch.zeros_like(leaf) if gradient is None else gradient
            assert_close(got, data[f"{prefix}/{name}"], about, f"{prefix}/{name}")


@pytest.mark.parametrize("change", ["mode", "transposed"])
def test_wrong_variants_do_not_match_the_independent_loop(change: str) -> None:
    data, about = load_oracle("ttt_lora/A_plain_m4")
    if change == "mode":
        about["mode"] = "B"
    else:
        data["W_base"] = data["W_base"].T.contiguous()
    y = oracle_layer(data, about)(data["x"])
    assert (y - data["y"]).abs().max() > 1e-4


# Groups


def group_of(form: str, count: int, **options: Any) -> list[TTTLoRACell]:
    """Random cells of linear layers with one input and different outputs, float64."""
    mode, loss = FORMS[form]
    learner = TTTLoRAOptions(mini_batch_size=4, mode=mode, loss=loss, **options)
    torch.manual_seed(0)
    cells = [TTTLoRACell(7, 5 + n, 3, learner).double() for n in range(count)]
    for cell in cells:
        for parameter in cell.parameters():
            nn.init.normal_(parameter, std=0.5)
    return cells


def read_group(cells: list[TTTLoRACell], x: Tensor, **flags: Tensor) -> Any:
    """What the cells read of a stream in two pieces, `[B, T, G, d]`, and the last state."""
    state, parts = None, []
    for start, stop in ((0, 6), (6, x.shape[1])):
        here = {name: value[:, start:stop] for name, value in flags.items()}
        inputs = project(cells, x[:, start:stop])
        read, state = read_and_learn(cells, inputs, state=state, **here)
        parts.append(read)
    return torch.cat(parts, dim=1), state


@pytest.mark.parametrize("options", [{}, {"rate_per_token": True, "q_residual": True}], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_group_equals_its_cells_one_by_one(form: str, options: dict[str, bool]) -> None:
    cells = group_of(form, 3, **options)
    x = torch.randn(2, 13, 7, dtype=torch.float64, requires_grad=True)
    flags = {
        "mask": torch.rand(2, 13) > 0.2,
        "document_ids": (torch.arange(13) > 8).long().expand(2, -1),
    }
    weights = [p for cell in cells for p in cell.parameters() if p.shape != (3,)]
    results, pairs = [], list(enumerate(cells))
    for groups in ([cells], [[cell] for cell in cells]):
        reads, states = zip(*(read_group(group, x, **flags) for group in groups), strict=True)
        read = torch.cat(reads, dim=2)
        dw = torch.cat([state.dw for state in states], dim=1)
        pending = torch.cat([state.pending_v for state in states], dim=2)
        outs = [cell.output(x.new_zeros(2, 13, 5 + n), read[:, :, n]) for n, cell in pairs]
        loss = sum(out.sin().sum() for out in outs) + dw.sin().sum() + pending.cos().sum()
        own = [*weights, *(cell.b_base for cell in cells), x]
        results.append([read, dw, pending, *torch.autograd.grad(loss, own)])
    for together, alone in zip(*results, strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)  # other matrix sizes


# Size


@pytest.mark.parametrize("sizes", [(7, 7), (7, 11), (16, 5)], ids=str)
@pytest.mark.parametrize("rate_per_token", [False, True])
@pytest.mark.parametrize("output_norm", [False, True])
def test_parameters_are_as_many_as_the_formula_says(
    sizes: tuple[int, int], rate_per_token: bool, output_norm: bool
) -> None:
    options = {"rate_per_token": rate_per_token, "output_norm": output_norm}
    cell = TTTLoRACell(*sizes, 4, TTTLoRAOptions(**options))
    count = sum(p.numel() for p in cell.parameters())
    assert count == parameter_count(*sizes, 4, **options)
    documented = sizes[0] * rate_per_token - 2 * 4 * (not output_norm)
    assert count == parameter_count(*sizes, 4) + documented
    budget = 6 * sum(sizes)
    d = match_lora(6, *sizes, **options)
    assert parameter_count(*sizes, d, **options) <= budget
    assert budget < parameter_count(*sizes, d + 1, **options)


def test_a_rate_per_token_is_paid_for_where_the_rank_is_low() -> None:
    without = match_lora(6, 16, 5)
    assert parameter_count(16, 5, without, rate_per_token=True) > 6 * 21
    assert match_lora(6, 16, 5, rate_per_token=True) < without


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mini_batch_size": 0}, "mini_batch_size=0 must be at least 1"),
        ({"mode": "C"}, "mode='C'.*reading the future"),
        ({"loss": "l1"}, "loss='l1' must be plain or ln"),
        ({"loss": "ln", "output_norm": False}, "set output_norm, or plain"),
        ({"scaling": 0.0}, "scaling=0 switches the adapter off"),
    ],
)
def test_wrong_option_names_the_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TTTLoRAOptions(**options)


def test_size_below_one_is_an_error() -> None:
    with pytest.raises(ValueError, match="inner_dim=0 must be at least 1"):
        TTTLoRACell(3, 3, 0, TTTLoRAOptions())


def test_tokens_without_rows_are_refused() -> None:
    data, about = load_oracle("ttt_lora/A_plain_m4")
    layer = oracle_layer(data, about)
    with pytest.raises(ValueError, match=r"must be \[B, T, in\].*MoE"):
        layer(data["x"][0])
    layer.enable_adapters(False)
    assert torch.equal(layer(data["x"][0]), layer.base_layer(data["x"][0]))
