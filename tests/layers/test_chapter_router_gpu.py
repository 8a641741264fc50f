"""ChapterRouter on a GPU: as on the CPU, without waiting, the same in every run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from router_cases import BLOCK, Batch, T, assert_same, batch, make_router, per_token, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STRATEGIES = ("token", "block", "rolling", "prompt", "sequence")
KINDS = ("plain", "masked", "documents", "both")


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.set_sync_debug_mode("default")


def _on_gpu(given: Batch) -> Batch:
    return Batch(*(None if value is None else value.cuda() for value in given))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_routing_and_gradients_equal_those_of_the_cpu_without_waiting(
    strategy: str, kind: str
) -> None:
    found = []
    for device in ("cpu", "cuda"):
        router, given = make_router(strategy, z_coefficient=1.0).to(device), batch(kind)
        given = given if device == "cpu" else _on_gpu(given)
        weight = given.real.unsqueeze(-1).to(device)
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        routing = run(router, given)
        further = run(router, given, routing.state, document_alignment=BLOCK)
        losses = further.losses(router.config, given.mask)
        further.statistics(given.mask)
        weights = per_token(further, T)[1]
        (torch.where(weight, weights, 0.0).sum() + sum(losses.values())).backward()
        torch.cuda.set_sync_debug_mode("default")
        values = [value.cpu() for value in per_token(routing, T)]
        found.append((values, [p.grad.cpu() for p in router.parameters()]))
    assert_same(found[1][0], found[0][0], batch(kind).real)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("strategy", STRATEGIES[:-1])
def test_earlier_decisions_do_not_change_a_bit_with_a_later_token(strategy: str) -> None:
    router, given = make_router(strategy).float().cuda(), _on_gpu(batch("both"))
    given = given._replace(x=given.x.float())
    before = per_token(run(router, given), T)
    for t in range(T):
        x = given.x.clone()
        x[:, t] += 10
        after = per_token(run(router, given._replace(x=x)), T)
        assert all(torch.equal(a[:, :t], b[:, :t]) for a, b in zip(after, before, strict=True))
