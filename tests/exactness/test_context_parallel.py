"""Layers and models whose rows are shared by processes, against one process with all tokens."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from in_place_mlp_cases import SIZE, in_place_mlp
from lact_model_cases import VARIANTS, lact_model, token_ids
from torch import Tensor, nn
from torch.distributed import all_reduce
from ttt_cases import relative_error
from two_processes import in_processes

from lightning_modules.streams import FastState

LENGTHS, ROWS, TOLERANCE = (14, 2, 18), 3, 1e-10
"""Tokens of the calls: chunks and windows end anywhere; float64."""

FLAGS = ((), ("mask",), ("mask", "document_ids"))
Call = Callable[[Tensor, FastState, dict[str, Tensor]], Tensor]


def flags_of(names: tuple[str, ...]) -> dict[str, Tensor]:
    """A random mask and documents for all tokens."""
    generator = torch.Generator().manual_seed(2)
    shape = (ROWS, sum(LENGTHS))
    mask = torch.rand(shape, generator=generator) > 0.25
    ids = (torch.rand(shape, generator=generator) < 0.1).cumsum(1)
    flags = {"mask": mask, "document_ids": ids}
    return {name: flags[name] for name in names}


def read(
    call: Call, module: nn.Module, x: Tensor, flags: dict[str, Tensor], group: Any, world: int = 1
) -> tuple[list[Tensor], FastState, Tensor, dict[str, Tensor]]:
    """Outputs of the calls, what is carried, gradients by x and by parameters.

    Args:
        call: of the module.
        module: whose parameters are differentiated.
        x: all tokens.
        flags: of all tokens.
        group: processes that share the calls; None: none, the own part is read alone.
        world: in how many parts the calls are cut.
    """
    rank = torch.distributed.get_rank() if world > 1 else 0
    x = x.detach().clone()
    leaf = x.requires_grad_() if x.is_floating_point() else x
    handle, outputs, losses, start = FastState(group=group), [], [], 0
    for length in LENGTHS:
        own = length // world
        here = slice(start + rank * own, start + (rank + 1) * own)
        o = call(leaf[:, here], handle, {name: value[:, here] for name, value in flags.items()})
        weight = torch.randn(
            x.shape[0],
            sum(LENGTHS),
            o.shape[-1],
            dtype=o.dtype,
            generator=torch.Generator().manual_seed(3),
        )[:, here]
        real = flags["mask"][:, here].unsqueeze(-1) if "mask" in flags else 1
        outputs.append((o * real).detach())
        losses.append((weight * o * real).sum())
        handle, start = handle.advance(), start + length
    parameters = dict(module.named_parameters())
    inputs = [*parameters.values(), *([leaf] if x.is_floating_point() else [])]
    found = torch.autograd.grad(torch.stack(losses).sum(), inputs, materialize_grads=True)
    by_x = found[-1] if x.is_floating_point() else torch.zeros(())
    return outputs, handle, by_x, dict(zip(parameters, found, strict=False))


def compare(call: Call, module: nn.Module, x: Tensor, names: tuple[str, ...], what: str) -> None:
    """The parts of this process against what all tokens give, and against parts left alone."""
    group, flags = torch.distributed.group.WORLD, flags_of(names)
    rank, world = group.rank(), group.size()
    whole, carried, by_x, gradients = read(call, module, x, flags, None)
    parts, handle, own_by_x, own = read(call, module, x, flags, group, world)
    alone, *_ = read(call, module, x, flags, None, world)
    errors, wrong = [], []
    for n, length in enumerate(LENGTHS):
        here = slice(rank * length // world, (rank + 1) * length // world)
        errors.append(relative_error(parts[n], whole[n][:, here]))
        wrong.append(relative_error(alone[n], whole[n][:, here]))
    for slot, fields in carried.outgoing.items():
        for name, value in fields.items():
            found = handle.outgoing[slot][name]
            if value.is_floating_point():
                errors += [relative_error(found, value)] if value.numel() else []
            else:
                assert torch.equal(found, value), f"{what}: {slot} {name}"
    for name, gradient in (*own.items(), ("x", own_by_x)):
        expected = by_x if name == "x" else gradients[name]
        all_reduce(gradient)
        errors.append(relative_error(gradient, expected))
    assert max(errors) < TOLERANCE, f"{what} {names}: {max(errors)}"
    assert max(wrong) > 1e-3, f"{what} {names}: no power"


def call_model(
    model: nn.Module, ids: Tensor, handle: FastState, flags: dict[str, Tensor]
) -> Tensor:
    return model(input_ids=ids, fast_state=handle, use_cache=False, **flags).logits


def call_layer(layer: nn.Module, x: Tensor, handle: FastState, flags: dict[str, Tensor]) -> Tensor:
    return layer(x, fast_state=handle, **flags)


def share_lact(rank: int, folder: Path, variants: tuple[str, ...]) -> None:
    """LaCT models, window attention included."""
    x = token_ids(ROWS, sum(LENGTHS))
    for number, variant in enumerate(variants):
        model = lact_model(variant)
        call = partial(call_model, model)
        compare(call, model, x, FLAGS[number % len(FLAGS)], variant)
    memory = lact_model(branches="memory")  # without a window that others take positions from
    compare(partial(call_model, memory), memory, x, FLAGS[2], "memory")
    handle = FastState(group=torch.distributed.group.WORLD)
    with pytest.raises(ValueError, match="labels are shifted by one token"):
        model(input_ids=x, labels=x, fast_state=handle)


def share_in_place(rank: int, folder: Path, variants: tuple[str, ...]) -> None:
    """In-Place MLPs, with causal and symmetric convolutions."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, sum(LENGTHS), SIZE, generator=generator, dtype=torch.float64)
    for variant in variants:
        layer = in_place_mlp(variant)
        for names in FLAGS:
            compare(partial(call_layer, layer), layer, x, names, variant)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:use_muon with lact_chunk_size:UserWarning")
def test_lact_models_that_share_rows_are_one_with_all_tokens(tmp_path: Path) -> None:
    # Every variant with some of the flags; the default with all of them.
    in_processes(2, share_lact, tmp_path, (*VARIANTS, "default", "default"))


@pytest.mark.slow
def test_in_place_layers_that_share_rows_are_one_with_all_tokens(tmp_path: Path) -> None:
    variants = ("causal", "symmetric_clipped", "symmetric_of_seven", "short_chunks", "one_tap")
    in_processes(2, share_in_place, tmp_path, variants)
