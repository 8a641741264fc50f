"""What must hold of chapter attention whatever the numbers are, and variants that break it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from chapter_cases import BACKENDS, PATHS, Case, differentiate, make_case, relative_error
from torch import Tensor

ROUNDING = 1e-12
"""float64, sums in another order."""


@pytest.mark.parametrize("mixing", ["joint", "mixture"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("path", PATHS)
def test_a_row_alone_is_the_row_in_a_batch_bit_for_bit(
    path: str, dtype: torch.dtype, mixing: str
) -> None:
    """Outputs, and gradients by what is the row's own."""
    options: dict[str, Any] = {"top_k": 3, "shared": 1, "mixing": mixing, **PATHS[path]}
    case = make_case(batch=3, dtype=dtype, heads=8, kv_heads=4, size=16, **options)
    case = case.with_tensors(log_weights=case.tensors["log_weights"].float())

    def run(c: Case) -> dict[str, Tensor]:
        """Outputs and gradients by queries and weights for a cotangent of ones."""
        leaves = {name: c.tensors[name].clone().requires_grad_() for name in ("q", "log_weights")}
        outputs = c.with_tensors(**leaves).outputs("torch")
        total = torch.stack([x.float().sum() for x in outputs.values()]).sum()
        found = torch.autograd.grad(total, list(leaves.values()))
        return {**outputs, **dict(zip(leaves, found, strict=True))}

    together = run(case)
    for row in range(3):
        alone = run(case.rows(slice(row, row + 1)))
        for name, x in alone.items():
            assert torch.equal(x[0], together[name][row]), (row, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("return_lse", [False, True])
def test_a_row_alone_reads_the_whole_bank_alike(return_lse: bool, dtype: torch.dtype) -> None:
    """Bit for bit in float32. Rows are one sequence here, and in float64 the BLAS takes another
    kernel for a shorter one: 1e-14 is rounding."""
    case = make_case(time=37, top_k=1, batch=3, heads=8, kv_heads=4, size=16, dtype=dtype)
    q = case.tensors["q"]
    whole = Case({n: x for n, x in case.tensors.items() if n != "log_weights"}, None, {})
    together = whole.run("torch", return_lse=return_lse)
    for row in range(3):
        alone = whole.with_tensors(q=q[row : row + 1]).run("torch", return_lse=return_lse)
        for x, y in zip(alone, together, strict=True) if return_lse else [(alone, together)]:
            error = (x[0] - y[row]).abs().max().item()
            assert error <= (0 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("path", PATHS)
def test_the_same_call_gives_the_same_gradients_bit_for_bit(path: str) -> None:
    case = make_case(top_k=3, shared=2, **PATHS[path])
    first, second = (differentiate(case, lambda c: c.outputs("torch")) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("mixing", ["joint", "mixture"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", PATHS)
def test_the_order_of_chosen_chapters_does_not_matter(path: str, backend: str, mixing: str) -> None:
    case = make_case(top_k=4, shared=1, mixing=mixing, **PATHS[path])
    expected = case.outputs(backend)
    assert relative_error(case.choices([2, 0, 3, 1]).outputs(backend), expected) < ROUNDING


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", PATHS)
def test_joint_is_the_recombination_of_single_chapters(path: str, backend: str) -> None:
    """Weights `softmax_c(lse_c + log w_c)` of outputs read from one chapter each."""
    case = make_case(top_k=3, **PATHS[path])
    plain = case.with_tensors(log_weights=torch.zeros_like(case.tensors["log_weights"]))
    parts = [plain.choices(slice(j, j + 1)).outputs(backend) for j in range(3)]
    size, time = case.options.get("block_size", 1), case.tensors["q"].shape[1]
    logs = case.tensors["log_weights"].repeat_interleave(size, 1)[:, :time].unsqueeze(2)
    lse = torch.stack([part["lse"] for part in parts], -1) + logs
    o = (lse.softmax(-1).unsqueeze(-1) * torch.stack([part["o"] for part in parts], -2)).sum(-2)
    expected = {"o": o, "lse": lse.logsumexp(-1)}
    assert relative_error(case.outputs(backend), expected) < ROUNDING
    unweighted = {"o": torch.stack([part["o"] for part in parts]).mean(0), "lse": expected["lse"]}
    assert relative_error(unweighted, expected) > 0.1


@pytest.mark.quick("*--inf-joint-torch", "*--10000.0-mixture-torch", "sorted-*-naive")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mixing", ["joint", "mixture"])
@pytest.mark.parametrize("weight", [-1e4, -torch.inf])
@pytest.mark.parametrize("path", PATHS)
def test_a_chapter_without_weight_is_not_read(
    path: str, weight: float, mixing: str, backend: str
) -> None:
    """And the gradients are finite and those of the call without it."""
    case = make_case(top_k=3, shared=1, mixing=mixing, **PATHS[path])
    off = case.tensors["log_weights"].clone()
    off[..., 1] = weight
    expected = differentiate(case.choices([0, 2]), lambda c: c.outputs(backend))
    actual = differentiate(case.with_tensors(log_weights=off), lambda c: c.outputs(backend))
    by_weight = actual.pop("grad/log_weights")
    assert not by_weight[..., 1].any()
    assert (
        relative_error({**actual, "grad/log_weights": by_weight[..., [0, 2]]}, expected) < ROUNDING
    )


@pytest.mark.parametrize("path", PATHS)
def test_chapters_that_nobody_reads_have_no_gradient(path: str) -> None:
    case = make_case(top_k=1, shared=1, **PATHS[path])
    assert case.chapters is not None
    gradients = differentiate(case, lambda c: c.outputs("torch"))
    read = {0, *case.chapters.flatten().tolist()}
    for c in range(len(case.tensors["mem_k"])):
        assert bool(gradients["grad/mem_v"][c].any()) == (c in read)


# --- wrong variants: the comparisons above must see them ---


def weights_on_keys(case: Case) -> Tensor:
    """A public mistake: the weight scales the keys (here all of them by one) in place of a bias."""
    k = case.tensors["mem_k"] * case.tensors["log_weights"].exp().mean()
    zeros = torch.zeros_like(case.tensors["log_weights"])
    return case.with_tensors(mem_k=k, log_weights=zeros).run("torch")


def weights_on_outputs(case: Case) -> Tensor:
    """The other half of it: training weighs outputs, inference logits."""
    return case.run("torch", mixing="mixture")


def rows_in_another_order(case: Case) -> Tensor:
    """Chapters cut across (row c of every chapter) instead of along."""
    swapped = {
        name: case.tensors[name].transpose(0, 1).reshape(case.tensors[name].shape)
        for name in ("mem_k", "mem_v")
    }
    return case.with_tensors(**swapped).run("torch")


def weights_of_other_chapters(case: Case) -> Tensor:
    """Chapters sorted, their weights not."""
    weights = case.tensors["log_weights"].flip(-1)
    return case.with_tensors(log_weights=weights).run("torch")


def values_of_other_heads(case: Case) -> Tensor:
    """Grouped heads read in turn (h modulo Hkv), not side by side."""
    q = case.tensors["q"].unflatten(2, (2, 2)).transpose(2, 3).flatten(2, 3)
    return case.with_tensors(q=q).run("torch").unflatten(2, (2, 2)).transpose(2, 3).flatten(2, 3)


def shared_with_a_weight(case: Case) -> Tensor:
    """Shared chapters divided among each other as if they were routed."""
    weights = case.tensors["log_weights"] + torch.tensor(2.0).log()
    return case.with_tensors(log_weights=weights).run("torch")


WRONG: list[Callable[[Case], Tensor]] = [
    weights_on_keys,
    weights_on_outputs,
    rows_in_another_order,
    weights_of_other_chapters,
    values_of_other_heads,
    shared_with_a_weight,
]


@pytest.mark.parametrize("path", ["sorted", "blocks", "decoding"])
@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_comparison_with_naive_sees(wrong: Callable[[Case], Tensor], path: str) -> None:
    case = make_case(top_k=3, shared=2, seed=5, **PATHS[path])
    expected = {"o": case.run("naive")}
    assert relative_error({"o": case.run("torch")}, expected) < ROUNDING
    assert relative_error({"o": wrong(case)}, expected) > 0.01
