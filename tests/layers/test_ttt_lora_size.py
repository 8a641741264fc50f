"""Sizes of TTT-LoRA adapters against counted parameters and the published table."""

import json

import pytest
import torch
from helpers import ORACLES

from lightning_modules.layers.ttt_lora_size import (
    match_lora,
    match_lora_siblings,
    parameter_count,
)

ROWS = json.loads((ORACLES / "ttt_lora/param_table.json").read_text())["rows"]
SIBLINGS = {
    "q_k_v": [(576, 576), (576, 192), (576, 192)],
    "gate_up": [(576, 1536), (576, 1536)],
    "unlike": [(64, 8), (16, 512)],
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['in_features']}-{row['out_features']}")
def test_inner_dim_is_that_of_the_oracle_table(row: dict[str, int]) -> None:
    sizes, rank = (row["in_features"], row["out_features"]), row["lora_rank"]
    inner_dim = match_lora(rank, *sizes)
    assert inner_dim == row["inner_dim_floor"]
    assert parameter_count(*sizes, inner_dim) == row["params_floor"] <= row["lora_params"]
    assert parameter_count(*sizes, row["inner_dim_nearest"]) == row["params_nearest"]


def test_half_the_rank_is_wrong_where_in_is_not_out() -> None:
    assert any(
        match_lora(r["lora_rank"], r["in_features"], r["out_features"]) != r["lora_rank"] // 2 - 1
        for r in ROWS
        if r["in_features"] != r["out_features"]
    )
    assert parameter_count(512, 512, 32) > 64 * 1024 >= parameter_count(512, 512, 31)
    assert parameter_count(9728, 2560, 32) > 1.25 * 64 * (9728 + 2560)


def test_count_is_that_of_the_tensors() -> None:
    d, inputs, outputs = 5, 7, 11
    thetas = [torch.empty(d, inputs)] * 3 + [torch.empty(outputs, d)]
    own = [torch.empty(d, d), torch.empty(d), torch.empty(d), torch.empty(d), torch.empty(1)]
    assert parameter_count(inputs, outputs, d) == sum(x.numel() for x in (*thetas, *own))


@pytest.mark.parametrize("name", SIBLINGS)
@pytest.mark.parametrize("rank", [8, 16, 64])
def test_siblings_have_the_largest_common_size_by_search(rank: int, name: str) -> None:
    sizes = SIBLINGS[name]
    budget = rank * sum(i + o for i, o in sizes)
    inner_dim = match_lora_siblings(rank, sizes)

    def total(d: int) -> int:
        return sum(parameter_count(i, o, d) for i, o in sizes)

    assert total(inner_dim) <= budget < total(inner_dim + 1)


@pytest.mark.parametrize("rank", range(3, 70))
def test_one_layer_has_the_largest_size_by_search(rank: int) -> None:
    d = match_lora(rank, 10, 13)
    assert parameter_count(10, 13, d) <= rank * 23 < parameter_count(10, 13, d + 1)


def test_a_rank_that_is_too_low_says_so() -> None:
    with pytest.raises(ValueError, match=r"rank 1 has 40 .* at least 85.*higher rank"):
        match_lora(1, 20, 20)
    with pytest.raises(ValueError, match="at least one"):
        match_lora_siblings(8, [])
