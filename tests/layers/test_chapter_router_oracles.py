"""ChapterRouter against the float64 loops of the oracle: decisions, losses, every gradient."""

from typing import Any

import pytest
import torch
from helpers import ORACLES, load_oracle
from torch import Tensor

from lightning_modules.layers import chapter_router
from lightning_modules.layers.chapter_router import ChapterRouter, Routing
from lightning_modules.layers.memory_options import RouterConfig
from lightning_modules.layers.pooling import RouterState, mean_of, pool_sequence, pool_window
from lightning_modules.layers.router import entropy, log_weights, masked_mean, top_k
from lightning_modules.layers.router_load import RouterLoad, chosen_of

Case = tuple[dict[str, Tensor], dict[str, Any]]

FILES = sorted(path.stem for path in (ORACLES / "chapter_router").glob("*.safetensors"))
CASES = [name for name in FILES if name.startswith(("token", "block", "rolling"))]
STRATEGIES = {
    "token_routing": "token",
    "block_causal_routing": "block",
    "rolling_window_routing": "rolling",
}


def _case(name: str, dtype: torch.dtype) -> Case:
    tensors, metadata = load_oracle(f"chapter_router/{name}")
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}, metadata


def _router(case: Case, **changed: Any) -> ChapterRouter:
    tensors, metadata = case
    options = {
        "num_chapters": metadata["num_routed"] + metadata["num_shared"],
        "shared": metadata["num_shared"],
        "top_k": metadata["top_k"],
        "strategy": STRATEGIES[metadata["kind"]],
        "block_size": metadata.get("block_size", 1),
        "window": metadata.get("window", 1),
        "renormalize": False,
    }
    router = ChapterRouter(metadata["hidden_dim"], RouterConfig(**options | changed))
    router = router.to(tensors["hidden_states"].dtype)
    names = [name for name, _ in router.named_parameters()]
    router.load_state_dict({name: tensors[name] for name in names})
    return router


def _run(router: ChapterRouter, case: Case, **given: Any) -> Routing:
    tensors, metadata = case
    given.setdefault("mask", tensors.get("attention_mask"))
    given.setdefault("document_ids", tensors.get("document_ids"))
    if metadata.get("decision_unit") == "block":
        given.setdefault("document_alignment", metadata["block_size"])
    return router(tensors["hidden_states"], **given)


@pytest.fixture(autouse=True)
def _grid_from_the_first_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle counts blocks from the first place of a row, also with padding on the left."""

    def zeros(x: Tensor, mask: Any, state: Any) -> Tensor:
        return torch.zeros(len(x), dtype=torch.int64)

    monkeypatch.setattr(chapter_router, "first_position", zeros)


def _counted(tensors: dict[str, Tensor]) -> Tensor:
    """Decisions that the oracle counts, bool `[B, n]`."""
    for name in ("block_valid", "attention_mask"):
        if name in tensors and tensors[name].shape == tensors["selected"].shape[:2]:
            return tensors[name]
    return torch.ones(tensors["selected"].shape[:2], dtype=torch.bool)


def _assert_close(actual: Tensor, reference: Tensor, name: str) -> None:
    if reference.dtype == torch.float64:
        torch.testing.assert_close(actual, reference, rtol=1e-9, atol=1e-10, msg=name)
    else:  # the oracle's own limit for float32
        error = (actual - reference).abs().max()
        assert error <= 1e-4 * reference.abs().max() + 1e-5, f"{name}: {error}"


def test_there_are_oracles() -> None:
    assert len(FILES) == 17 and len(CASES) == 14


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_decisions_match_the_oracle(name: str, dtype: torch.dtype) -> None:
    tensors, metadata = case = _case(name, dtype)
    routing = _run(_router(case), case)
    counted = _counted(tensors)
    assert routing.logits.shape == tensors["logits"].shape
    assert routing.block_size == (
        metadata["block_size"] if metadata.get("decision_unit") == "block" else 1
    )
    assert torch.equal(routing.chapters[counted], tensors["selected"][counted])
    choices = routing.chapters - metadata["num_shared"]
    renormalised = log_weights(routing.logits, choices, True)
    for key, value in {
        "logits": routing.logits,
        "probs": routing.logits.softmax(-1),
        "weights_raw": routing.log_weights.exp(),
        "weights": renormalised.exp(),
    }.items():
        _assert_close(value[counted], tensors[key][counted], key)
    if metadata["top_k"] > 1:
        normed = _run(_router(case, renormalize=True, routed_scaling=2.5), case).log_weights
        _assert_close(normed.exp()[counted], 2.5 * tensors["weights"][counted], "scaled")


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("block")])
def test_decisions_of_every_token_match_the_oracle(name: str) -> None:
    tensors, _ = case = _case(name, torch.float64)
    router, x = _router(case), tensors["hidden_states"]
    fresh = RouterState(*(torch.zeros_like(value) for value in router(x).state))
    routing = _run(router, case, document_alignment=None, state=fresh)
    assert routing.block_size == 1
    real = tensors.get("attention_mask", torch.ones(x.shape[:2], dtype=torch.bool))
    _assert_close(routing.logits[real], router.router(tensors["pooled_token"])[real], name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_losses_and_every_gradient_match_the_oracle(name: str, dtype: torch.dtype) -> None:
    tensors, metadata = case = _case(name, dtype)
    router = _router(case)
    leaves = {"hidden_states": tensors["hidden_states"].requires_grad_()}
    leaves |= dict(router.named_parameters())
    routing = _run(router, case)
    choices = routing.chapters - metadata["num_shared"]
    counted = routing.decisions(tensors.get("attention_mask"))
    assert torch.equal(counted, _counted(tensors))
    load = RouterLoad.of(routing.logits, choices, counted)
    _assert_close(load.chosen / load.decisions, tensors["fraction_routed"], "f")
    _assert_close(load.probability / load.decisions, tensors["mean_prob"], "P")
    certainty = entropy(routing.logits.softmax(-1)).unsqueeze(-1)
    scalars = {
        "load_balance": load.balance(),
        "z_loss": load.z_loss(),
        "entropy": masked_mean(certainty, counted).squeeze(-1),
    }
    for key, value in scalars.items():
        _assert_close(value, tensors[key], key)
    grad_out = tensors["grad_out"]
    targets = {
        "grad": (log_weights(routing.logits, choices, True).exp() * grad_out).sum(),
        "grad_raw": (routing.log_weights.exp() * grad_out).sum(),
        "grad_lb": scalars["load_balance"],
        "grad_z": scalars["z_loss"],
        "grad_entropy": scalars["entropy"],
    }
    checked = 0
    for prefix, value in targets.items():
        found = torch.autograd.grad(
            value, list(leaves.values()), retain_graph=True, materialize_grads=True
        )
        for leaf, gradient in zip(leaves, found, strict=True):
            reference = tensors[f"{prefix}/{leaf}"]
            _assert_close(gradient, reference, f"{prefix}/{leaf}")
            if prefix == "grad" and metadata["top_k"] == 1:
                assert not gradient.any(), "a renormalised weight of 1 has no gradient"
            checked += 1
    assert checked == sum(key.startswith("grad") and "/" in key for key in tensors)


WRONG: dict[str, dict[str, Any]] = {
    "block_causal": {"block_size": 7},
    "block_causal_shared_top1": {"shared": 0, "num_chapters": 6},
    "rolling": {"window": 4},
}
WRONG_INPUT: dict[str, dict[str, Any]] = {
    "block_causal_masked": {"mask": None},
    "block_causal_documents_aligned": {"document_ids": None},
    "block_causal_documents_misaligned": {"document_alignment": 4},
    "block_causal_documents_masked": {"document_ids": None},
    "rolling_masked_documents": {"document_ids": None},
}


@pytest.mark.parametrize("name", [*WRONG, *WRONG_INPUT])
def test_wrong_variant_does_not_match_the_oracle(name: str) -> None:
    tensors, metadata = case = _case(name, torch.float64)
    routing = _run(_router(case, **WRONG.get(name, {})), case, **WRONG_INPUT.get(name, {}))
    x = tensors["hidden_states"]
    real = tensors.get("attention_mask", torch.ones(x.shape[:2], dtype=torch.bool))
    size = metadata["block_size"] if metadata.get("decision_unit") == "block" else 1
    found, expected = (
        chapters.repeat_interleave(tokens, 1)[:, : x.shape[1]][real]
        for chapters, tokens in (
            (routing.chapters, routing.block_size),
            (tensors["selected"], size),
        )
    )
    assert not torch.equal(found, expected)


def test_sequence_matches_the_reference_in_choice_weights_and_gradients() -> None:
    tensors, metadata = load_oracle("chapter_router/ref_sequence_noncausal")
    config = RouterConfig(
        num_chapters=metadata["num_chapters"],
        top_k=metadata["top_k"],
        strategy="sequence",
        allow_non_causal=True,
    )
    router = ChapterRouter(metadata["hidden_dim"], config).double()
    router.load_state_dict({name: tensors[name] for name in ("router.weight", "router.bias")})
    x = tensors["hidden_states"].requires_grad_()
    routing = router(x)
    assert routing.block_size == x.shape[1]
    assert torch.equal(routing.chapters.squeeze(1), tensors["selected"])
    weights = routing.log_weights.exp().squeeze(1)
    _assert_close(weights, tensors["weights"], "weights")
    leaves = {"hidden_states": x} | dict(router.named_parameters())
    found = torch.autograd.grad((weights * tensors["grad_out"]).sum(), list(leaves.values()))
    for name, gradient in zip(leaves, found, strict=True):
        _assert_close(gradient, tensors[f"grad/{name}"], name)
    load = RouterLoad.of(routing.logits, routing.chapters)
    reference = tensors["reference_load_balance"]  # of float32 shares, and not divided by k
    torch.testing.assert_close(
        load.balance() * config.top_k, reference.to(x.dtype), rtol=1e-6, atol=0
    )
    _assert_close(load.z_loss(), tensors["reference_z_loss"], "z")


def test_the_reference_counts_shared_chapters_in_its_losses_and_this_router_does_not() -> None:
    tensors, metadata = load_oracle("chapter_router/ref_sequence_noncausal_shared")
    x, shared = tensors["hidden_states"].requires_grad_(), metadata["num_shared"]
    means = mean_of(pool_window(x, metadata["window"]).sums, None)
    pooled = mean_of(pool_sequence(means).sums, None)
    weight = tensors["router.weight"].requires_grad_()
    logits = (pooled @ weight.T + tensors["router.bias"])[..., shared:]
    choices = top_k(logits, metadata["top_k"])
    assert torch.equal((choices + shared).squeeze(1), tensors["selected"])
    weights = log_weights(logits, choices, True).exp().squeeze(1)
    _assert_close(weights, tensors["weights"], "weights")
    gradients = torch.autograd.grad((weights * tensors["grad_out"]).sum(), [x, weight])
    _assert_close(gradients[0], tensors["grad/hidden_states"], "hidden_states")
    _assert_close(gradients[1], tensors["grad/router.weight"], "router.weight")
    balance = RouterLoad.of(logits, choices).balance() * metadata["top_k"]
    assert (balance - tensors["reference_load_balance"]).abs() > 1e-2


def test_losses_at_the_fixed_points_of_the_oracle() -> None:
    tensors, metadata = load_oracle("chapter_router/loss_fixed_points")
    n, k = metadata["num_routed"], metadata["top_k"]
    for name, deviation in {"balanced": 0.0, "collapsed": n / k - 1}.items():
        probabilities, selected = tensors[f"{name}_probs"], tensors[f"{name}_selected"]
        load = RouterLoad.of(probabilities.log().clamp(min=-1e4), selected)
        torch.testing.assert_close(load.balance(), tensors[f"{name}_load_balance"])
        torch.testing.assert_close(load.deviation().item(), deviation)
    assert chosen_of(tensors["collapsed_selected"], n).sum() == n * k
    load = RouterLoad.of(torch.zeros(n, n, dtype=torch.float64), tensors["balanced_selected"])
    torch.testing.assert_close(load.z_loss(), tensors["balanced_z_loss"])
