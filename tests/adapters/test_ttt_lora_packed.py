"""TTT-LoRA whose weights are packed for the kernels, against the same weights one by one.

Packing is for a GPU; here it is switched on on a CPU, with the torch backend behind it.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from ttt_lora_tuner_cases import (
    adapted,
    adapter_layers,
    config_of,
    own_parameters,
    peft_model,
    read_chunks,
    shake,
    text,
)

from lightning_modules.adapters.ttt_lora import layer
from lightning_modules.layers import ttt_lora as cell_layer
from lightning_modules.layers.ttt_lora import TTTLoRACell, TTTLoRAOptions
from lightning_modules.layers.ttt_lora_output import is_plain, may_overwrite
from lightning_modules.layers.ttt_lora_packed import Packing

SUMS = {"rtol": 1e-12, "atol": 1e-13}
"""float64 products in other shapes; values and gradients are of the order of 1."""


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Packs everywhere; the list gets the number of groups of every packing."""
    calls: list[int] = []
    pack = Packing.pack

    def counted(packing: Packing, dtype: torch.dtype) -> Any:
        calls.append(len(packing.groups))
        return pack(packing, dtype)

    monkeypatch.setattr(Packing, "pack", counted)
    monkeypatch.setattr(layer, "takes_kernels", lambda *call: True)
    return calls


def train(model: nn.Module, chunks: int = 2) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Logits, gradients of own parameters and of the embeddings, of a stream with its graph."""
    model.zero_grad()
    y, state = read_chunks(model, text(), [13 - 6 * (chunks - 1), *[6] * (chunks - 1)])
    total = y.sin().sum()
    for fields in state.outgoing.values():
        total = total + sum(x.sin().sum() for x in fields.values() if x.is_floating_point())
    total.backward()
    grads = {name: p.grad for name, p in own_parameters(model).items()}
    return y.detach(), grads, model.get_input_embeddings().weight.grad


def assert_equal_runs(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual[0], expected[0], **SUMS)
    torch.testing.assert_close(actual[2], expected[2], **SUMS)
    assert actual[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        torch.testing.assert_close(actual[1][name], grad, **SUMS, msg=name)


def unpacked(model: nn.Module, **options: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "takes_kernels", lambda *call: False)
        return train(model, **options)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # without and with biases
@pytest.mark.parametrize("method", ["A_plain", "B_ln", "together"])
def test_packed_is_one_by_one(packing: list[int], method: str, architecture: str) -> None:
    model = adapted(method, architecture)
    expected = unpacked(model)
    assert not packing
    assert_equal_runs(train(model), expected)
    assert packing == [2 if method == "together" else 4] * (2 * 2)  # layers, chunks


def test_sizes_that_need_no_padding_and_a_scale_are_one_by_one(packing: list[int]) -> None:
    model = peft_model(dtype=torch.float64, inner_dim=8, scaling=0.5, output_norm=False)
    expected = unpacked(model.requires_grad_(True))
    assert_equal_runs(train(model), expected)
    assert packing


def test_packed_again_in_backward_it_is_the_same(packing: list[int]) -> None:
    model = adapted("A_plain").train()
    expected = train(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    actual = train(model)
    assert packing == [4] * (4 + 8)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_changed_weights_are_packed_anew(packing: list[int]) -> None:
    model = adapted("A_plain")
    before, _, _ = train(model)
    shake(model, seed=5)
    after = train(model)
    assert not torch.allclose(after[0], before)
    assert_equal_runs(after, unpacked(model))


def test_two_active_adapters_are_packed_each_by_itself(packing: list[int]) -> None:
    model = peft_model(dtype=torch.float64)
    model.add_adapter("second", config_of("B_plain", inner_dim=2))
    model.base_model.set_adapter(["default", "second"])
    shake(model).requires_grad_(True)
    expected = unpacked(model)
    assert_equal_runs(train(model), expected)
    assert packing == [4] * 8
    model.set_adapter("second")
    model.requires_grad_(True)
    assert_equal_runs(train(model), unpacked(model))


def test_new_adapters_are_their_base_bit_for_bit(packing: list[int]) -> None:
    model = peft_model(shaken=False)
    with model.disable_adapter():
        base = read_chunks(model, text(), [7, 6])[0]
    assert not packing
    assert torch.equal(read_chunks(model, text(), [7, 6])[0], base)
    assert packing


def test_bfloat16_products_of_float32_weights_are_one_by_one() -> None:
    torch.manual_seed(0)
    cells = [TTTLoRACell(12, 5 + n, 3, TTTLoRAOptions()) for n in range(2)]
    for cell in cells:
        cell.theta_out.reset_parameters()
    packs = Packing([[cell] for cell in cells]).pack(torch.bfloat16)
    used = [(p.weights, p.outputs[0], p.eta, p.norm) for p in packs]
    sum(x.float().square().sum() for group in used for x in group).backward()
    for cell, packed in zip(cells, packs, strict=True):
        maps = torch.cat([cell.theta_k.weight, cell.theta_q.weight, cell.theta_v.weight])
        assert torch.equal(packed.weights[:9], maps.bfloat16())
        assert not packed.weights[9:].any() and packed.weights.shape == (16, 12)
        out = cell.theta_out.weight
        assert torch.equal(packed.outputs[0][:, :3], out.bfloat16())
        assert not packed.outputs[0][:, 3:].any() and packed.outputs[0].shape[1] == 8
        assert torch.equal(packed.base[0], torch.cat([cell.w_base, cell.b_base[None]]))
        assert torch.equal(packed.eta, cell.lr_gate.sigmoid())
        for weight in (cell.theta_q.weight, out):
            assert torch.equal(weight.grad, 2 * weight.bfloat16().float())
        eta = cell.lr_gate.sigmoid()
        torch.testing.assert_close(cell.lr_gate.grad, 2 * eta * eta * (1 - eta))
        assert torch.equal(cell.norm.weight.grad, 2 * cell.norm.weight)
        assert cell.w_base.grad is None  # nothing asked for it


def test_what_cannot_be_packed_is_taken_one_by_one(packing: list[int]) -> None:
    model = adapted("B_plain")  # rates per token
    assert_equal_runs(train(model), unpacked(model))
    model = adapted("A_plain")
    found = next(iter(adapter_layers(model).values()))
    found.ttt_lora_cells["default"].theta_k.float()
    assert Packing([[found.ttt_lora_cells["default"]]]).pack(torch.float64) is None


def test_only_an_output_that_nobody_else_has_is_overwritten() -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    plain, biased = nn.Linear(4, 5, bias=False), nn.Linear(4, 5)
    assert may_overwrite(plain, plain(x))
    assert not may_overwrite(biased, biased(x))  # a view: autograd would copy it
    assert not may_overwrite(nn.Sequential(plain), plain(x))
    assert not may_overwrite(plain, torch.randn(2, 3, 5, requires_grad=True))
    plain.register_forward_hook(lambda module, args, y: None)
    assert not may_overwrite(plain, plain(x))


def test_overwritten_or_not_it_is_the_same_product() -> None:
    y, read, weight = (torch.randn(s, dtype=torch.float64) for s in ((2, 3, 5), (2, 3, 8), (5, 8)))
    leaves = [x.requires_grad_() for x in (y, read, weight)]
    expected = y + 0.5 * F.linear(read, weight)
    grads = torch.autograd.grad(expected.sin().sum(), leaves)
    for overwrite in (False, True):
        found = layer.add_product(y * 1, read, weight, 0.5, overwrite)
        torch.testing.assert_close(found, expected, **SUMS)
        torch.testing.assert_close(torch.autograd.grad(found.sin().sum(), leaves), grads, **SUMS)


def frozen(model: nn.Module) -> nn.Module:
    """The model, whose linear layers with adapters get no gradients."""
    for found in adapter_layers(model).values():
        found.get_base_layer().requires_grad_(False)
    return model


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many linear layers were computed with their adapters, for every group."""
    counts: list[int] = []
    read = layer.read_and_learn

    def counted(*given: Any, **named: Any) -> Any:
        counts.append(0 if named["linears"] is None else len(named["linears"].weights))
        return read(*given, **named)

    monkeypatch.setattr(layer, "read_and_learn", counted)
    return counts


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # without and with biases
def test_frozen_layers_computed_with_their_adapters_are_one_by_one(
    packing: list[int], computed: list[int], architecture: str
) -> None:
    model = frozen(adapted("A_plain", architecture))
    expected = unpacked(model)
    assert not any(computed)
    assert_equal_runs(train(model), expected)
    assert computed[-4:] == [3, 1, 2, 1]


def test_layers_that_something_else_has_a_part_in_are_computed_by_themselves(
    packing: list[int], computed: list[int]
) -> None:
    where = {"layers_to_transform": [1]}
    model = frozen(peft_model(dtype=torch.float64, **where))
    model.add_adapter("second", config_of(inner_dim=2, target_modules=["v_proj"], **where))
    model.base_model.set_adapter(["default", "second"])
    layers = adapter_layers(model)
    up = next(m for path, m in layers.items() if path.endswith("up_proj"))
    up.base_layer.register_forward_hook(lambda module, args, y: None)
    shake(model).get_input_embeddings().requires_grad_(True)
    actual = train(model, 1)
    assert computed == [0, 0, 1, 0, 1]  # q, k, v; the second's v; o; gate, up; down
    assert_equal_runs(actual, unpacked(model, chunks=1))


def test_copied_layers_are_computed_and_dropped_models_are_gone_at_once(
    packing: list[int], computed: list[int]
) -> None:
    model = frozen(adapted("A_plain"))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        shake(copied, seed=7)
        group = next(iter(adapter_layers(copied).values())).ttt_lora_places["default"][0]
        own = {id(found) for found in adapter_layers(copied).values()}
        assert {id(found) for found in group.layers.alive()} <= own
        computed.clear()
        assert_equal_runs(train(copied), unpacked(copied))
        assert computed[:4] == [3, 1, 2, 1]
    there = weakref.ref(next(iter(adapter_layers(model).values())))
    gc.collect()
    gc.disable()
    try:
        del model
        assert there() is None
    finally:
        gc.enable()


def test_only_a_frozen_linear_layer_without_hooks_is_plain() -> None:
    plain, dtype = nn.Linear(4, 5), torch.float32
    assert not is_plain(plain, dtype)
    plain.requires_grad_(False)
    assert is_plain(plain, dtype) and not is_plain(plain, torch.bfloat16)
    assert not is_plain(nn.Sequential(plain), dtype)
    hooked = [nn.Linear(4, 5).requires_grad_(False) for _ in range(3)]
    hooked[0].register_forward_pre_hook(lambda module, args: None)
    hooked[1].register_full_backward_hook(lambda module, before, after: None)
    hooked[2].forward = lambda x: x
    assert not any(is_plain(module, dtype) for module in hooked)
    for name in ("weight", "bias"):  # as FSDP does that flattens parameters
        layer = nn.Linear(2, 3).requires_grad_(False)
        value = getattr(layer, name).data
        delattr(layer, name)
        setattr(layer, name, value)
        assert not is_plain(layer, dtype), name


@pytest.mark.slow  # 20 seconds: Triton's interpreter
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
def test_frozen_layers_computed_with_the_kernels_are_one_by_one_on_the_torch_backend(
    packing: list[int], computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton_interpreter")
    options = {"layers_to_transform": [1], "scaling": 0.5}
    model = frozen(peft_model("qwen2", dtype=torch.float64, **options).requires_grad_(True))
    expected = unpacked(model)
    kernels = partial(cell_layer.ttt_lora_cell, backend="triton")
    monkeypatch.setattr(cell_layer, "ttt_lora_cell", kernels)
    actual = train(model)
    assert computed[-4:] == [3, 1, 2, 1]
    # float64: the kernels take sums in another order
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow  # 20 seconds: Triton's interpreter
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
def test_packed_for_the_kernels_is_one_by_one_on_the_torch_backend(
    packing: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton_interpreter")
    model = peft_model(dtype=torch.float64, layers_to_transform=[1]).requires_grad_(True)
    expected = unpacked(model)
    kernels = partial(cell_layer.ttt_lora_cell, backend="triton")
    monkeypatch.setattr(cell_layer, "ttt_lora_cell", kernels)
    actual = train(model)
    assert packing == [4, 4]
    # float64: the kernels take sums in another order
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow  # a minute: the compiler, and Triton's interpreter
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
def test_compiled_with_the_kernels_in_its_graph_is_one_by_one_on_the_torch_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton_interpreter")
    model = peft_model(dtype=torch.float64, layers_to_transform=[1]).requires_grad_(True)
    expected = train(model)
    kernels = partial(cell_layer.ttt_lora_cell, backend="triton")
    monkeypatch.setattr(cell_layer, "ttt_lora_cell", kernels)
    torch._dynamo.reset()
    model.compile(backend="aot_eager", fullgraph=True)
    actual = train(model)
    torch._dynamo.reset()
    # float64: the kernels take sums in another order
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
