"""Losses and statistics of routing: against transformers, formulas, and one process against two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from router_cases import BLOCK, B, D, T, batch, make_router, run
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from two_processes import in_two_processes

from lightning_modules.layers.chapter_router import ChapterRouter, Routing
from lightning_modules.layers.router import balance_loss, z_loss
from lightning_modules.layers.router_load import RouterLoad, chosen_of

COEFFICIENTS = {"balance_coefficient": 0.5, "load_coefficient": 0.25, "z_coefficient": 2.0}
ROUTED, K = 6, 2


def _load(routing: Routing, mask: Tensor | None) -> RouterLoad:
    return RouterLoad.of(routing.logits, routing.chapters - routing.shared, routing.decisions(mask))


@pytest.mark.parametrize("kind", ["plain", "masked"])
def test_balance_equals_mixtrals_divided_by_k(kind: str) -> None:
    router, given = make_router("token"), batch(kind)
    routing = run(router, given)
    flat = routing.logits.flatten(0, 1)
    attention_mask = None if given.mask is None else given.mask.long()
    expected = load_balancing_loss_func((flat,), ROUTED, K, attention_mask) / K
    found = _load(routing, given.mask).balance()
    torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=0)  # float32 inside
    gradients = [
        torch.autograd.grad(loss, router.router.weight, retain_graph=True)[0]
        for loss in (found, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("strategy", ["token", "block", "sequence"])
@pytest.mark.parametrize("kind", ["plain", "masked", "both"])
def test_losses_equal_those_of_the_token_functions(strategy: str, kind: str) -> None:
    router, given = make_router(strategy, **COEFFICIENTS), batch(kind)
    routing = run(router, given)
    losses, counted = routing.losses(router.config, given.mask), routing.decisions(given.mask)
    chosen = chosen_of(routing.chapters - 1, ROUTED)
    balance = balance_loss(routing.logits.softmax(-1), chosen, counted)
    torch.testing.assert_close(losses["router_balance"], 0.5 * balance)
    torch.testing.assert_close(losses["router_z"], 2 * z_loss(routing.logits, counted))
    assert set(losses) == {"router_balance", "router_load", "router_z"}


def test_only_losses_that_are_asked_for_are_computed() -> None:
    router = make_router("token", balance_coefficient=0.0, z_coefficient=0.1)
    assert set(run(router, batch()).losses(router.config)) == {"router_z"}
    router = make_router("token", balance_coefficient=0.0)
    assert run(router, batch()).losses(router.config) == {}


def test_deviation_is_that_of_the_counts_and_its_gradient_twice_that_of_balance() -> None:
    router, given = make_router("block"), batch("masked")
    routing = run(router, given)
    load = _load(routing, given.mask)
    counts = torch.zeros(ROUTED, dtype=torch.float64)
    for row, at in routing.decisions(given.mask).nonzero().tolist():
        for chapter in routing.chapters[row, at].tolist():
            counts[chapter - 1] += 1
    relative = counts / counts.mean() - 1
    torch.testing.assert_close(load.deviation(), relative.square().mean())
    assert load.deviation() > 0.01
    weight = router.router.weight
    deviation, balance = (
        torch.autograd.grad(loss, weight, retain_graph=True)[0]
        for loss in (load.deviation(), load.balance())
    )
    torch.testing.assert_close(deviation, 2 * balance, rtol=1e-10, atol=1e-12)
    assert deviation.abs().max() > 1e-3


def test_a_step_along_the_gradient_lowers_the_deviation() -> None:
    logits = torch.randn(64, ROUTED, generator=torch.Generator().manual_seed(0)).double()
    logits[:, 0] += 1.5
    values = []
    for _ in range(30):
        logits.requires_grad_()
        choices = logits.topk(K).indices
        deviation = RouterLoad.of(logits, choices).deviation()
        values.append(deviation.item())
        gradient = torch.autograd.grad(deviation, logits)[0]
        logits = (logits - 5 * gradient).detach()
    assert values[-1] < 0.3 * values[0]


def test_without_a_decision_losses_are_zero_and_have_no_gradient() -> None:
    router, given = make_router("block", **COEFFICIENTS), batch("masked")
    mask = torch.zeros_like(given.mask)
    routing = run(router, given._replace(mask=mask))
    losses = routing.losses(router.config, mask)
    assert all(loss == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert not router.router.weight.grad.any()
    assert all(v.isfinite().all() and not v.any() for v in routing.statistics(mask).values())


def test_blocks_count_if_they_have_a_token_that_counts() -> None:
    router, given = make_router("block"), batch()
    routing = run(router, given)
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[0], mask[1, 5], mask[2, T - 1] = True, True, True
    expected = [[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert routing.decisions(mask).int().tolist() == expected
    assert routing.block_size == BLOCK and routing.decisions().all()


@pytest.mark.parametrize("strategy", ["token", "block", "rolling", "prompt", "sequence"])
@pytest.mark.parametrize("kind", ["plain", "both"])
def test_statistics_equal_a_loop_over_decisions(strategy: str, kind: str) -> None:
    router, given = make_router(strategy), batch(kind)
    routing = run(router, given)
    found, counted = routing.statistics(given.mask), routing.decisions(given.mask)
    assert not any(value.requires_grad for value in found.values())
    for row in range(B):
        here = counted[row].nonzero().flatten().tolist()
        p = routing.logits[row].detach().softmax(-1)
        sets = {t: set((routing.chapters[row, t] - 1).tolist()) for t in here}
        counts = [sum(i in chosen for chosen in sets.values()) for i in range(ROUTED)]
        pairs = [sets[t] != sets[t - 1] for t in here if t - 1 in sets]
        expected = {
            "counts": counts,
            "probability": p[here].sum(0).tolist(),
            "decisions": len(here),
            "entropy": -(p * p.log()).sum(-1)[here].mean().item(),
            "top_k_mass": sum(p[t, list(sets[t])].sum().item() for t in here) / len(here),
            "z": sum(routing.logits[row, t].logsumexp(-1).item() ** 2 for t in here) / len(here),
            "changed": sum(pairs) / max(len(pairs), 1),
        }
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name][row].tolist() == pytest.approx(value, rel=1e-10), name


class _Trained(nn.Module):
    """A model whose forward pass returns the router's losses."""

    def __init__(self) -> None:
        super().__init__()
        self.router: ChapterRouter = make_router("rolling", **COEFFICIENTS)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.stack([*self.router(x, mask=mask).losses(self.router.config, mask).values()])


def _gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters()]


def train_in_process(rank: int, folder: Path) -> None:
    """One step of data-parallel training on this rank's rows."""
    given, model = batch("masked"), DistributedDataParallel(_Trained())
    rows = slice(0, 1) if rank == 0 else slice(1, B)
    transfers, all_reduce = [], torch.distributed.all_reduce

    def spy(x: Tensor, *args: object) -> None:
        transfers.append(x.numel())
        all_reduce(x, *args)

    torch.distributed.all_reduce = spy
    losses = model(given.x[rows], given.mask[rows])
    losses.sum().backward()
    torch.distributed.all_reduce = all_reduce
    saved = {"losses": losses.detach(), "gradients": _gradients(model), "transfers": transfers}
    torch.save(saved, folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes_have_the_loss_and_gradient_of_one_with_all_rows(tmp_path: Path) -> None:
    in_two_processes(train_in_process, tmp_path)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    given, model = batch("masked"), _Trained()
    losses = model(given.x, given.mask)
    losses.sum().backward()
    for saved in found:
        torch.testing.assert_close(saved["losses"], losses.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(saved["gradients"], _gradients(model), rtol=1e-10, atol=1e-12)
        assert saved["transfers"] == [2 * ROUTED + 2]  # in one transfer, all three losses
    parts = []
    for rows in (slice(0, 1), slice(1, B)):  # what each would do by itself
        model = _Trained()
        model(given.x[rows], given.mask[rows]).sum().backward()
        parts.append(_gradients(model))
    averaged = [(a + b) / 2 for a, b in zip(*parts, strict=True)]
    assert not torch.allclose(averaged[0], found[0]["gradients"][0], rtol=1e-3)


def test_losses_and_statistics_under_autocast_are_float32() -> None:
    router, given = make_router("block", **COEFFICIENTS).float(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        routing = run(router, given._replace(x=given.x.bfloat16()))
        values = [*routing.losses(router.config).values(), *routing.statistics().values()]
    assert {value.dtype for value in values} == {torch.float32}
    assert routing.statistics()["counts"].shape == (B, ROUTED)
    assert router.router.in_features == D
