"""InPlaceMLP: the base bit for bit, the invariances of the design, wrong variants, bad input."""

import copy
from typing import Any

import pytest
import torch
from in_place_mlp_cases import CHUNK, VARIANTS, GatedMLP, in_place_mlp, read, tokens
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GemmaConfig, LlamaConfig, Qwen3Config
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from lightning_modules.layers.chunk_conv import ChunkConv
from lightning_modules.layers.in_place_mlp import InPlaceConfig, InPlaceMLP, InPlaceMLPState
from lightning_modules.streams import FastState, reset_rows

LENGTH = 17
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
"""float64 sums in another order."""
SPLITS = [[1] * LENGTH, [CHUNK] * 3 + [2], [6, 11], [CHUNK - 1, 1, 12], [3, 1, 1, 9, 3]]
every_variant = pytest.mark.parametrize("variant", VARIANTS)

MLPS = {
    "llama": (LlamaMLP, LlamaConfig),
    "qwen3": (Qwen3MLP, Qwen3Config),
    "gemma": (GemmaMLP, GemmaConfig),
}


def flags_of(seed: int = 0, batch: int = 2, length: int = LENGTH) -> dict[str, Tensor]:
    """A random mask and documents that differ by row."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(batch, length, generator=generator) < 0.2
    mask = torch.rand(batch, length, generator=generator) > 0.25
    return {"mask": mask, "document_ids": 7 + starts.cumsum(1)}


def assert_same(actual: InPlaceMLPState, expected: InPlaceMLPState) -> None:
    torch.testing.assert_close(actual._asdict(), expected._asdict(), **CLOSE)


# The base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("family", MLPS)
def test_layer_starts_as_the_base_bit_for_bit(
    family: str, symmetric: bool, dtype: torch.dtype
) -> None:
    mlp_class, config_class = MLPS[family]
    torch.manual_seed(0)
    config = config_class(hidden_size=16, intermediate_size=40, num_attention_heads=4)
    mlp = mlp_class(config).to(dtype)
    x = tokens(length=30).repeat(1, 1, 2).to(dtype)
    layer = InPlaceMLP(mlp, InPlaceConfig(chunk_size=4, symmetric=symmetric))
    layer.slot = "mlp"
    expected = mlp(x)
    assert torch.equal(layer(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), mlp(x))
    in_pieces, state = read(layer, x, [7, 10, 13])
    assert torch.equal(in_pieces, torch.cat([mlp(part) for part in x.split([7, 10, 13], 1)], 1))
    assert all(v.dtype == torch.float32 for v in state if v.is_floating_point())
    nn.init.normal_(layer.ttt.ttt_conv.weight)
    assert not torch.equal(layer(x), expected)


def test_names_of_the_base_stay_and_what_is_new_sits_in_one_module() -> None:
    mlp = GatedMLP()
    layer = InPlaceMLP(mlp, InPlaceConfig())
    base, new = mlp.state_dict().keys(), layer.ttt.state_dict().keys()
    assert layer.state_dict().keys() == {*base, *(f"ttt.{name}" for name in new)}
    assert new == {"ttt_conv.weight", "ttt_proj.weight"}
    assert layer.down_proj is mlp.down_proj


def test_reset_parameters_of_all_modules_gives_the_initial_layer() -> None:
    layer = in_place_mlp()
    for module in layer.ttt.modules():
        if hasattr(module, "reset_parameters") and not isinstance(module, nn.Linear):
            module.reset_parameters()
    fresh = InPlaceMLP(GatedMLP().double(), layer.config)
    for actual, expected in zip(layer.ttt.parameters(), fresh.ttt.parameters(), strict=True):
        assert torch.equal(actual, expected)
    assert torch.equal(fresh.ttt.ttt_proj.weight, torch.eye(8, dtype=torch.float64))
    assert not fresh.ttt.ttt_conv.weight.any()


@every_variant
def test_every_parameter_gets_a_gradient(variant: str) -> None:
    layer = in_place_mlp(variant)
    layer(tokens()).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_convolution_gets_a_gradient_from_zero() -> None:
    layer = InPlaceMLP(GatedMLP().double(), InPlaceConfig(chunk_size=CHUNK))
    layer(tokens()).square().sum().backward()
    assert layer.ttt.ttt_conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_a_chunk_adds_at_most_a_share_of_the_weight(size: float) -> None:
    """Without being asked: eta = 1 and targets of any size must not destroy the weight."""
    layer = in_place_mlp(clip=InPlaceConfig().clip, eta=1e3)
    with torch.no_grad():
        layer.down_proj.weight.mul_(size)
    weight = layer.down_proj.weight.detach()
    _, after = read(layer, tokens(length=2 * CHUNK))
    once = InPlaceConfig().clip * weight.norm()
    one = read(layer, tokens(length=CHUNK))[1].dw
    torch.testing.assert_close(one.flatten(1).norm(dim=1), once.expand(2), rtol=1e-9, atol=0)
    assert (after.dw.flatten(1).norm(dim=1) <= 2 * once * (1 + 1e-9)).all()


# Time


@every_variant
@pytest.mark.parametrize("given", ["target_states", "flags"])
def test_outputs_before_a_changed_token_stay_bit_identical(variant: str, given: str) -> None:
    """Also with a symmetric convolution: a chunk is written after it has been read."""
    layer, x = in_place_mlp(variant), tokens()
    flags = flags_of() if given == "flags" else {"target_states": tokens(seed=3)}
    with torch.no_grad():
        before = layer(x, **flags)
        for t in range(LENGTH):
            other = {n: v.clone() for n, v in {**flags, "x": x}.items()}
            for name in ("x", "target_states"):
                if name in other:
                    other[name][:, t] += 1
            after = layer(**other)
            assert torch.equal(after[:, :t], before[:, :t])
            assert not torch.equal(after[:, t], before[:, t])


@every_variant
def test_a_target_reaches_later_chunks_alone(variant: str) -> None:
    layer, x = in_place_mlp(variant, chunk_size=CHUNK), tokens()
    targets = tokens(seed=3)
    with torch.no_grad():
        before = layer(x, target_states=targets)
        targets[:, 1] += 1
        after = layer(x, target_states=targets)
    change = (after - before).abs().amax(dim=(0, 2))
    assert not change[:CHUNK].any() and (change[CHUNK:] > 1e-4).all()


@pytest.mark.quick("*-flags-causal", "*-flags-symmetric_clipped", "*6, 11]-*")
@every_variant
@pytest.mark.parametrize("given", [False, True], ids=["plain", "flags"])
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_stream_split_anywhere_equals_one_pass(sizes: list[int], given: bool, variant: str) -> None:
    """Outputs, the last state, every gradient."""
    layer, x = in_place_mlp(variant), tokens().requires_grad_()
    flags = flags_of() if given else {}
    weight = tokens(seed=9)

    def gradients(out: Tensor, state: InPlaceMLPState) -> list[Tensor]:
        loss = (out * weight).sum() + sum(v.square().sum() for v in state if v.requires_grad)
        return list(torch.autograd.grad(loss, [x, *layer.parameters()]))

    expected, whole = read(layer, x, **flags)
    actual, state = read(layer, x, sizes, **flags)
    torch.testing.assert_close(actual, expected, **CLOSE)
    assert_same(state, whole)
    for found, wanted in zip(gradients(actual, state), gradients(expected, whole), strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("seed", range(8))
def test_random_flags_split_anywhere_equal_one_pass(seed: int) -> None:
    for variant in VARIANTS:
        layer, x = in_place_mlp(variant), tokens(batch=3)
        flags = flags_of(seed, batch=3)
        flags["mask"][seed % 3, : 4 * seed] = False
        generator = torch.Generator().manual_seed(seed)
        cuts = torch.randperm(LENGTH - 1, generator=generator)[:4].sort().values + 1
        sizes = torch.diff(cuts, prepend=torch.zeros(1), append=torch.tensor([LENGTH])).int()
        with torch.no_grad():
            expected, whole = read(layer, x, **flags)
            actual, state = read(layer, x, sizes.tolist(), **flags)
        torch.testing.assert_close(actual, expected, **CLOSE)
        assert_same(state, whole)


@pytest.mark.parametrize("name", InPlaceMLPState._fields[:5])
def test_wrong_variant_that_drops_a_part_of_the_state_is_not_one_pass(name: str) -> None:
    layer, x = in_place_mlp("symmetric"), tokens()
    with torch.no_grad():
        expected, _ = read(layer, x)
        _, state = read(layer, x[:, :8])
        kept, _ = read(layer, x[:, 8:], state=state)
        wrong = state._replace(**{name: torch.zeros_like(getattr(state, name))})
        out, _ = read(layer, x[:, 8:], state=wrong)
    torch.testing.assert_close(kept, expected[:, 8:], **CLOSE)
    assert not torch.allclose(out, expected[:, 8:], rtol=1e-4, atol=1e-4)


@every_variant
def test_without_adapting_any_split_is_one_pass_and_fresh_rows_read_the_base(variant: str) -> None:
    layer, x, parts = in_place_mlp(variant), tokens(), []
    handle = FastState(adapt=False)
    with torch.no_grad():
        expected = GatedMLP.forward(layer, x)
        for part in x.split([4, 1, 7, 5], 1):
            parts.append(layer(part, fast_state=handle))
            handle = handle.advance()
    torch.testing.assert_close(torch.cat(parts, 1), expected, **CLOSE)
    state = handle.read("mlp", InPlaceMLPState)
    assert (state.tokens_seen == LENGTH).all() and not state.dw.any() and not handle.outgoing


# Rows, documents, padding


@every_variant
def test_a_row_among_other_rows_equals_the_row_alone(variant: str) -> None:
    layer, x, flags = in_place_mlp(variant), tokens(3), flags_of(batch=3)
    with torch.no_grad():
        together, state = read(layer, x, [5, 12], **flags)
        for row in range(3):
            here = slice(row, row + 1)
            own = {name: value[here] for name, value in flags.items()}
            alone, known = read(layer, x[here], [5, 12], **own)
            torch.testing.assert_close(alone, together[here], **CLOSE)
            assert_same(known, InPlaceMLPState(*(value[here] for value in state)))


@every_variant
@pytest.mark.parametrize("sizes", [[LENGTH], [6, 1, 10], [1] * LENGTH], ids=str)
def test_packed_documents_equal_documents_read_by_themselves(
    sizes: list[int], variant: str
) -> None:
    layer, x = in_place_mlp(variant), tokens()
    ids = torch.tensor([[3] * 6 + [1] * 11, [0] * 1 + [2] * 12 + [4] * 4])
    parts = ([(0, 6), (6, LENGTH)], [(0, 1), (1, 13), (13, LENGTH)])
    with torch.no_grad():
        actual, state = read(layer, x, sizes, document_ids=ids)
        for row, own in enumerate(parts):
            for start, end in own:
                here, last = read(layer, x[row : row + 1, start:end])
                torch.testing.assert_close(actual[row : row + 1, start:end], here, **CLOSE)
            last = last._replace(document_id=ids[row, -1:])
            assert_same(InPlaceMLPState(*(v[row : row + 1] for v in state)), last)


@every_variant
@pytest.mark.parametrize("sizes", [[LENGTH], [6, 1, 10], [1] * LENGTH], ids=str)
def test_padding_anywhere_equals_the_tokens_without_it(sizes: list[int], variant: str) -> None:
    layer, x = in_place_mlp(variant), tokens(3)
    mask = torch.ones(3, LENGTH, dtype=torch.bool)
    mask[0, :4], mask[1, [3, 7, 8, 16]], mask[2, 9:] = False, False, False
    with torch.no_grad():
        out, state = read(layer, x, sizes, mask=mask)
        x[~mask] = 1e3
        other, same = read(layer, x, sizes, mask=mask)
        for row in range(3):
            real, alone = read(layer, x[row : row + 1, mask[row]])
            torch.testing.assert_close(out[row : row + 1, mask[row]], real, **CLOSE)
            assert_same(InPlaceMLPState(*(v[row : row + 1] for v in state)), alone)
    assert torch.equal(other[mask], out[mask])
    torch.testing.assert_close(same._asdict(), state._asdict(), rtol=0, atol=0)


@every_variant
def test_row_of_padding_keeps_its_state_and_a_reset_row_is_fresh(variant: str) -> None:
    layer, x = in_place_mlp(variant), tokens(3)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[0] = False
    with torch.no_grad():
        _, state = read(layer, x)
        _, after = read(layer, x[:, :4], state=state, mask=mask)
        for kept, given in zip(after, state, strict=True):
            assert torch.equal(kept[0], given[0])
        reset = reset_rows({"mlp": state._asdict()}, torch.tensor([False, True, False]))["mlp"]
        out, new = read(layer, x, [6, 11], state=InPlaceMLPState(**reset))
        fresh, known = read(layer, x, [6, 11])
        going_on, _ = read(layer, x, [6, 11], state=state)
    torch.testing.assert_close(out[1], fresh[1], **CLOSE)
    torch.testing.assert_close(out[[0, 2]], going_on[[0, 2]], **CLOSE)
    for actual, expected in zip(new, known, strict=True):
        torch.testing.assert_close(actual[1], expected[1], **CLOSE)


@every_variant
def test_state_of_zeros_is_no_state(variant: str) -> None:
    layer, x = in_place_mlp(variant), tokens()
    with torch.no_grad():
        out, state = read(layer, x)
        zeros = InPlaceMLPState(*(torch.zeros_like(v) for v in state))
        again, same = read(layer, x, state=zeros)
    torch.testing.assert_close(again, out, **CLOSE)
    assert_same(same, state)


# Training


@every_variant
def test_checkpointing_two_chunks_changes_nothing(variant: str) -> None:
    layer, x = in_place_mlp(variant), tokens()
    gradients = []
    for recompute in (False, True):
        handle, loss = FastState(), torch.zeros((), dtype=torch.float64)
        for part in x.split([8, 9], 1):
            call: dict[str, Any] = {"fast_state": handle}
            if recompute:
                out = checkpoint(layer, part, use_reentrant=False, **call)
            else:
                out = layer(part, **call)
            loss, handle = loss + out.square().sum(), handle.advance()
        found = torch.autograd.grad(loss, list(layer.parameters()))
        gradients.append([loss.detach(), *found])
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


@every_variant
def test_forward_mutates_no_parameter_and_keeps_nothing_without_a_handle(variant: str) -> None:
    layer, x = in_place_mlp(variant), tokens()
    before = copy.deepcopy(layer.state_dict())
    first = layer(x)
    assert torch.equal(layer(x), first)
    assert torch.equal(layer.eval()(x), first)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_layer_never_waits_for_a_value() -> None:
    """Compiled without a break."""
    torch._dynamo.reset()
    layer, x, flags = in_place_mlp("symmetric"), tokens(), flags_of()
    handle = FastState({"mlp": read(layer, x)[1]._asdict()})
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        out = compiled(x, fast_state=handle, **flags)
    assert torch.equal(out, layer(x, fast_state=handle, **flags))
    torch._dynamo.reset()


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        ({"eta": 0.0}, "eta=0.0 must be positive"),
        ({"clip": -1.0}, "clip=-1.0 must be positive; None"),
    ],
)
def test_wrong_option_names_the_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InPlaceConfig(**options)


def test_convolution_without_a_middle_or_taps_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"kernel_size=4 has no middle .* 5"):
        ChunkConv(3, 4, symmetric=True)
    with pytest.raises(ValueError, match="kernel_size=0 must be at least 1"):
        ChunkConv(3, 0)


def test_mlp_of_another_kind_is_an_error_that_names_what_is_missing() -> None:
    with pytest.raises(TypeError, match=r"Linear has no gate_proj, up_proj, down_proj, act_fn"):
        InPlaceMLP(nn.Linear(3, 3), InPlaceConfig())
    mlp = GatedMLP()
    mlp.down_proj = nn.Linear(12, 8)
    with pytest.raises(TypeError, match="without bias"):
        InPlaceMLP(mlp, InPlaceConfig())


def test_wrong_tokens_and_targets_are_errors() -> None:
    layer, x = in_place_mlp(), tokens()
    with pytest.raises(ValueError, match=r"x must be \[B, T, D\].*MoE"):
        layer(x[0])
    with pytest.raises(ValueError, match=r"target_states must have the shape of x, \[2, 17, 8\]"):
        layer(x, target_states=x[:, :3])


def test_state_without_a_slot_is_an_error() -> None:
    layer = in_place_mlp()
    layer.slot = ""
    with pytest.raises(ValueError, match=r"set mlp.slot"):
        layer(tokens(), fast_state=FastState())
