"""TTTLayer: options, masks, documents and the invariances of the design; errors by message."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gemma_cases import randomise
from torch import Tensor

from lightning_modules.layers.rope import mini_batch_positions, rotate_interleaved
from lightning_modules.layers.ttt import TTTConfig, TTTLayer
from lightning_modules.streams import FastState

HIDDEN, HEADS, LENGTH = 16, 2, 7  # LENGTH differs from the head size 8

VARIANTS = {
    "linear": {},
    "mlp": {"kind": "mlp"},
    "linear_mini_batches": {"mini_batch_size": 3},
    "linear_l2_over_length": {"qk_l2norm": True, "eta_over_length": True},
    "linear_target_norm": {"target_norm": True},
    "linear_causal": {"causal": True, "mini_batch_size": 4},
    "mlp_causal_gate": {"kind": "mlp", "causal": True, "mini_batch_size": 3, "use_gate": True},
}
CAUSAL = [name for name in VARIANTS if "causal" in name]
WHOLE_CALL = [name for name, options in VARIANTS.items() if "mini_batch_size" not in options]


def _layer(variant: str = "linear", seed: int = 0, **options: Any) -> TTTLayer:
    torch.manual_seed(seed)
    config = TTTConfig(num_heads=HEADS, **{**VARIANTS[variant], **options})
    return randomise(TTTLayer(HIDDEN, config), seed).double()


def _input(batch: int = 2, length: int = LENGTH, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, HIDDEN, generator=generator, dtype=torch.float64)


# Positions


def _counted_positions(
    mask: Tensor, documents: Tensor | None, size: int
) -> Iterator[tuple[int, int, int]]:
    """The definition, token by token: (row, token, position) of every real token."""
    for row in range(mask.shape[0]):
        document, count = None, 0
        for t in range(mask.shape[1]):
            if not mask[row, t]:
                continue
            here = None if documents is None else int(documents[row, t])
            count = 0 if here != document else count
            document = here
            yield row, t, count % size
            count += 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("with_documents", [True, False])
@pytest.mark.parametrize("cut", [0, 1, 6, 11])
def test_positions_equal_the_token_loop_also_across_calls(
    seed: int, with_documents: bool, cut: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(3, 17, generator=generator) > 0.3
    documents = (torch.rand(3, 17, generator=generator) > 0.7).long().cumsum(1)
    documents = documents if with_documents else None
    layer, state = _layer("linear_causal"), None
    pieces = []
    for part in (slice(0, cut), slice(cut, 17)):
        if part == slice(0, 0):
            continue
        x, own = _input(3, 17)[:, part], None if documents is None else documents[:, part]
        pieces.append(mini_batch_positions(x, 4, mask[:, part], own, state).expand(3, -1))
        _, state = layer(x, mask=mask[:, part], document_ids=own, state=state)
    positions = torch.cat(pieces, dim=1)
    for row, t, position in _counted_positions(mask, documents, 4):
        assert positions[row, t] == position


def test_positions_restart_where_the_state_ended_with_another_document() -> None:
    layer, x = _layer("linear_causal"), _input(1, 2)
    _, state = layer(x, document_ids=torch.tensor([[0, 0]]))
    for document, expected in ((0, [[2, 3]]), (5, [[0, 1]])):
        ids = torch.full((1, 2), document)
        assert mini_batch_positions(x, 4, None, ids, state).tolist() == expected


def test_rotation_equals_complex_multiplication() -> None:
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    positions = torch.randint(0, 9, (2, 5))
    angle = positions[..., None, None] * 10_000.0 ** (-torch.arange(0, 8, 2) / 8).double()
    pairs = torch.view_as_complex(x.unflatten(-1, (4, 2)))
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
    torch.testing.assert_close(rotate_interleaved(x, positions), expected)


# Invariances


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_never_mutates_parameters_state_or_input(variant: str) -> None:
    layer, x = _layer(variant), _input()
    with torch.no_grad():
        _, state = layer(x)
    before = copy.deepcopy((layer.state_dict(), x, state))
    for train in (True, False):
        layer.train(train)(x, state=state)
    torch.testing.assert_close((layer.state_dict(), x, state), before, rtol=0, atol=0)
    assert not list(layer.buffers())


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_are_independent_and_states_are_their_own(variant: str) -> None:
    layer, x = _layer(variant), _input(3)
    out, state = layer(x)
    for row in range(3):
        alone, own = layer(x[row : row + 1])
        torch.testing.assert_close(alone[0], out[row], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(own[0][0], state[0][row], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(state[0][0], state[0][1])


@pytest.mark.parametrize("variant", CAUSAL)
def test_causal_outputs_do_not_depend_on_the_future(variant: str) -> None:
    layer, x = _layer(variant), _input(1, 11)
    out, _ = layer(x)
    for t in (3, 4, 7, 10):
        changed = x.clone()
        changed[:, t] += 1.0
        other, _ = layer(changed)
        assert torch.equal(other[:, :t], out[:, :t])
        assert not torch.allclose(other[:, t], out[:, t])


@pytest.mark.parametrize("variant", [name for name in WHOLE_CALL if "causal" not in name])
def test_whole_call_is_permutation_equivariant(variant: str) -> None:
    layer, x = _layer(variant), _input()
    order = torch.randperm(LENGTH)
    torch.testing.assert_close(layer(x[:, order])[0], layer(x)[0][:, order], atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("variant", CAUSAL)
@pytest.mark.parametrize("cut", [1, 4, 5, 9])
def test_streaming_equals_one_pass(variant: str, cut: int) -> None:
    layer, x = _layer(variant), _input(2, 13)
    out, end = layer(x)
    first, state = layer(x[:, :cut])
    second, state = layer(x[:, cut:], state=state)
    torch.testing.assert_close(torch.cat([first, second], 1), out, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(state, end, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
def test_zeroed_state_equals_a_fresh_start(variant: str) -> None:
    layer, x = _layer(variant), _input()
    fresh, _ = layer(x)
    _, state = layer(_input(seed=5))
    carried, _ = layer(x, state=state)
    reset, _ = layer(x, state=type(state)(*(torch.zeros_like(value) for value in state)))
    torch.testing.assert_close(reset, fresh, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(carried, fresh), "the state has no influence"


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_equals_the_unpadded_run(variant: str) -> None:
    layer, x = _layer(variant), _input()
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0, 1]]).bool()
    garbage = torch.where(mask.unsqueeze(-1), x, 1e3)
    out, state = layer(garbage, mask=mask)
    assert torch.equal(out[~mask], torch.zeros_like(out[~mask]))
    for row in range(2):
        alone, own = layer(x[row : row + 1, mask[row]])
        torch.testing.assert_close(out[row, mask[row]], alone[0], rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(state[0][row], own[0][0], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_documents_equal_separate_runs(variant: str) -> None:
    layer, x = _layer(variant), _input(1, 12)
    lengths = (5, 1, 6)
    ids = torch.repeat_interleave(torch.tensor([3, 9, 4]), torch.tensor(lengths)).unsqueeze(0)
    out, state = layer(x, document_ids=ids)
    separate = [layer(piece) for piece in x.split(lengths, dim=1)]
    torch.testing.assert_close(out, torch.cat([o for o, _ in separate], 1), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(state[0], separate[-1][1][0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_learns_through_a_carried_state(variant: str) -> None:
    layer = _layer(variant)
    _, state = layer(_input())
    out, _ = layer(_input(seed=2), state=state)
    out.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_layers_share_nothing() -> None:
    first, second = _layer(), _layer(seed=1)
    expected = second(_input())[0]
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1.0)
    first(_input(seed=3))
    assert torch.equal(second(_input())[0], expected)


# Options


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_inner_learning_rate_reaches_the_update(kind: str) -> None:
    default = {"linear": 1.0, "mlp": 0.1}[kind]
    assert TTTConfig(kind=kind).inner_lr == default
    changes = {}
    for base_lr in (None, default, 2 * default):
        handle = FastState.transient({"fast_weight"})
        layer, x = _layer(kind, base_lr=base_lr), _input()
        _, state = layer(x, fast_state=handle)
        changes[base_lr] = state[0]
        weight, bias = layer.learnable_ttt_lr_weight, layer.learnable_ttt_lr_bias
        logits = torch.stack([x @ weight[h, 0] + bias[h] for h in range(HEADS)], -1)
        expected = layer.config.inner_lr * torch.sigmoid(logits) / (HIDDEN // HEADS)
        torch.testing.assert_close(handle.published["fast_weight"]["ttt"]["eta"], expected)
    assert torch.equal(changes[None], changes[default])
    torch.testing.assert_close(changes[2 * default], 2 * changes[default])


def _eta(layer: TTTLayer, x: Tensor, **call: Any) -> Tensor:
    handle = FastState.transient({"fast_weight"})
    layer(x, fast_state=handle, **call)
    return handle.published["fast_weight"]["ttt"]["eta"]


def test_eta_over_length_divides_by_the_writing_tokens_of_the_document() -> None:
    x = _input(1)
    plain = _eta(_layer(), x)
    layer = _layer(eta_over_length=True)
    torch.testing.assert_close(_eta(layer, x), plain / LENGTH)
    ids = torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    counts = torch.tensor([4, 4, 4, 4, 3, 3, 3]).view(1, -1, 1)
    torch.testing.assert_close(_eta(layer, x, document_ids=ids), plain / counts)
    writes = torch.tensor([[1, 0, 0, 1, 0, 1, 0]]).bool()
    counts = torch.tensor([2, 2, 2, 2, 1, 1, 1]).view(1, -1, 1)
    expected = plain / counts * writes.unsqueeze(-1)
    for name in ("write_mask", "mask"):
        torch.testing.assert_close(_eta(layer, x, document_ids=ids, **{name: writes}), expected)


def test_non_causal_mini_batches_divide_eta_by_their_size() -> None:
    torch.testing.assert_close(
        _eta(_layer("linear_mini_batches"), _input()), _eta(_layer(), _input()) / 3
    )


def test_target_norm_is_the_layer_norm_of_the_target() -> None:
    layer, plain = _layer("linear_target_norm"), _layer()
    x = _input()
    k, v = (proj(x).unflatten(-1, (HEADS, -1)) for proj in (layer.k_proj, layer.v_proj))
    target = v - k
    normed = (target - target.mean(-1, keepdim=True)) / (
        target.var(-1, unbiased=False, keepdim=True) + 1e-6
    ).sqrt()
    wanted = k + normed * layer.ttt_norm_weight + layer.ttt_norm_bias
    plain.v_proj.register_forward_hook(lambda *_: wanted.flatten(2))
    torch.testing.assert_close(layer(x)[0], plain(x)[0])


def test_read_only_tokens_read_what_the_others_wrote() -> None:
    layer, x = _layer(), _input()
    writes = torch.zeros(2, LENGTH, dtype=torch.bool)
    writes[:, :3] = True
    out, state = layer(x, write_mask=writes)
    _, alone = layer(x[:, :3])
    torch.testing.assert_close(state[0], alone[0], rtol=1e-12, atol=1e-12)
    other = x.clone()
    other[:, 5] += 1.0
    changed, same = layer(other, write_mask=writes)
    assert torch.equal(same[0], state[0]) and torch.equal(changed[:, :3], out[:, :3])


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_adaptation_fast_weights_are_read_but_not_written(variant: str) -> None:
    layer = _layer(variant)
    _, state = layer(_input(), flush=True)
    frozen = FastState(adapt=False)
    out, after = layer(_input(seed=2), state=state, fast_state=frozen, flush=True)
    size = len(layer.fast_weights)
    assert all(torch.equal(a, b) for a, b in zip(after[:size], state[:size], strict=True))
    nothing, _ = layer(_input(seed=2), fast_state=frozen, flush=True)
    assert not torch.allclose(out, nothing), "the carried state was not read"


def test_bfloat16_autocast_keeps_a_float32_state() -> None:
    layer, x = _layer().float(), _input().float()
    expected, _ = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = layer(x)
    assert state[0].dtype == torch.float32
    assert (out.float() - expected).abs().max() < 0.05 * expected.abs().max()
    whole, state = _layer().bfloat16()(x.bfloat16())
    assert whole.dtype == torch.bfloat16 and state[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "cubic"}, "choose 'linear' or 'mlp'"),
        ({"num_heads": 0}, "at least 1"),
        ({"base_lr": 0.0}, "must be positive"),
        ({"mini_batch_size": 0}, "at least 1"),
        ({"causal": True}, "needs mini_batch_size"),
        ({"mini_batch_size": 4, "eta_over_length": True}, "mini_batch_size=None"),
    ],
)
def test_configuration_errors_name_the_fix(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TTTConfig(**options)


def test_head_size_errors_name_the_fix() -> None:
    with pytest.raises(ValueError, match=r"set num_heads to one of \[1, 2, 5, 10\]"):
        TTTLayer(10, TTTConfig(num_heads=4))
    with pytest.raises(ValueError, match="even"):
        TTTLayer(6, TTTConfig(num_heads=2, causal=True, mini_batch_size=2))
