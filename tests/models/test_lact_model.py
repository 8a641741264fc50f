"""LaCT language models: published names, saving, initialisation, streams, checkpointing, masks."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lact_model_cases import CHUNK, UNUSUAL, VARIANTS, lact_config, lact_model, token_ids
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

from lightning_modules.models.lact import LaCTForCausalLM, LaCTModel
from lightning_modules.streams import FastState, StreamPlan, StreamState

pytestmark = pytest.mark.filterwarnings(UNUSUAL)
LENGTH = 15
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
"""float64 sums in another order, through two layers with up to three updates each."""
UNALIGNED = {"rtol": 1e-13, "atol": 1e-13}
"""Parameters in a mapped file lie at any address, and products of matrices mind that."""


# Names, files, initialisation


def _published_shapes(layers: int, rank: int | None, qk_norm: bool) -> dict[str, tuple[int, ...]]:
    """State dict of `LaCTForCausalLM` of github.com/a1600012888/LaCT (lact_llm/lact_model), whose
    MLP is `GatedMLP` of flash-linear-attention, at hidden size 16 with 2 heads of the memory."""
    weight = (
        {"": (2, 8, 8)} if rank is None else {".w_left": (2, 8, rank), ".w_right": (2, rank, 8)}
    )
    attn = {
        "qkv.weight": (48, 16),
        "o_proj.weight": (16, 16),
        "qk_scale": (16, 2),
        "qk_offset": (16, 2),
        "w1": (2, 8, 8),
        "lr_proj.weight": (6, 16),
        "lr_proj.bias": (6,),
        "ttt_scale_proj.weight": (2, 16),
        "ttt_scale_proj.bias": (2,),
        "momentum_proj.0.weight": (2, 16),
        "momentum_proj.0.bias": (2,),
        "ttt_norm.weight": (8,),
        **{f"{name}{end}": shape for name in ("w0", "w2") for end, shape in weight.items()},
        **({"q_norm.weight": (16,), "k_norm.weight": (16,)} if qk_norm else {}),
    }
    block = {
        "attn_norm.weight": (16,),
        "mlp_norm.weight": (16,),
        "mlp.gate_proj.weight": (24, 16),
        "mlp.up_proj.weight": (24, 16),
        "mlp.down_proj.weight": (16, 24),
        **{f"attn.{name}": shape for name, shape in attn.items()},
    }
    ends = {
        "model.embeddings.weight": (40, 16),
        "model.norm.weight": (16,),
        "lm_head.weight": (40, 16),
    }
    blocks = {f"model.layers.{i}.{n}": shape for i in range(layers) for n, shape in block.items()}
    return {**ends, **blocks}


@pytest.mark.parametrize(("rank", "qk_norm"), [(None, False), (3, True)])
def test_a_state_dict_with_the_published_names_loads(rank: int | None, qk_norm: bool) -> None:
    config = lact_config(w0_w2_low_rank=rank or -1, attn_qk_norm=qk_norm)
    shapes = _published_shapes(2, rank, qk_norm)
    model = LaCTForCausalLM(config)
    model.load_state_dict({name: torch.randn(shape) for name, shape in shapes.items()})
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == shapes


@pytest.mark.quick("default-False", "low_rank-True", "stack2-True")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("variant", ["default", "low_rank", "stack2"])
def test_a_saved_model_loads_with_equal_bytes(variant: str, tied: bool, tmp_path: Path) -> None:
    model = lact_model(variant, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float64)
    assert type(loaded) is LaCTForCausalLM
    assert (loaded.lm_head.weight is loaded.model.embeddings.weight) == tied
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    ids = token_ids()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, **UNALIGNED)
    loaded.save_pretrained(tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    base = AutoModel.from_pretrained(tmp_path / "a", dtype=torch.float64)
    assert type(base) is LaCTModel
    out = base(ids).last_hidden_state
    torch.testing.assert_close(out, model.model(ids).last_hidden_state, **UNALIGNED)


def _check_initialised(model: LaCTForCausalLM, but: tuple[str, ...] = ()) -> None:
    size, inner, rank = 32, 64, 8
    for name, value in model.named_parameters():
        last = name.split(".")[-1]
        if name in but:
            continue
        if "norm" in name or last == "qk_scale":
            assert (value == 1).all(), name
        elif last in ("bias", "qk_offset"):
            assert not value.any(), name
        else:
            drawn = {"w0": size**-0.5, "w2": size**-0.5, "w1": inner**-0.5}
            drawn |= {"w_left": 0.5 * rank**-0.5, "w_right": 0.5 * size**-0.5}
            expected = drawn.get(last, 0.02)
            assert abs(value.std() / expected - 1) < 0.1, name


WIDE: dict[str, Any] = {
    "hidden_size": 128,
    "num_lact_heads": 4,
    "inter_multi": 2,
    "initializer_range": 0.02,
    "num_attn_heads": 8,
    "attn_qk_norm": True,
    "vocab_size": 300,
    "intermediate_size": 64,
}


@pytest.mark.parametrize("rank", [-1, 8])
@pytest.mark.parametrize("r", [1, 2])
def test_a_new_model_starts_as_published_and_init_weights_keeps_it_so(r: int, rank: int) -> None:
    torch.manual_seed(0)
    config = lact_config(**WIDE, r=r, residual_ttt=r > 1, w0_w2_low_rank=rank)
    model = LaCTForCausalLM(config)
    _check_initialised(model)
    model.init_weights()
    _check_initialised(model)


@pytest.mark.parametrize("rank", [-1, 8])
@pytest.mark.parametrize("r", [1, 2])
def test_what_a_checkpoint_lacks_is_initialised_and_the_rest_is_kept(
    r: int, rank: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = lact_config(**WIDE, r=r, residual_ttt=r > 1, w0_w2_low_rank=rank)
    model = LaCTForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    ends = ("qk_scale", "w1", "w0.w_left", "lm_head.weight", "lr_proj.bias", "layers.0.attn.w2")
    saved = {name: value for name, value in model.state_dict().items() if name.endswith(ends)}
    model.save_pretrained(tmp_path, state_dict=dict(saved))
    loaded = LaCTForCausalLM.from_pretrained(tmp_path)
    assert len(saved) > 5
    for name, value in saved.items():
        assert torch.equal(loaded.state_dict()[name], value), name
    _check_initialised(loaded, tuple(saved))


def test_embeddings_can_be_replaced_and_resized() -> None:
    model = lact_model()
    assert model.get_input_embeddings() is model.model.get_input_embeddings()
    assert model.get_output_embeddings() is model.lm_head
    model.resize_token_embeddings(44)
    assert model(token_ids()).logits.shape[-1] == 44


def test_padding_that_is_the_end_of_text_token_is_learned() -> None:
    model = lact_model(pad_token_id=2)
    model(torch.tensor([[5, 2, 7]])).logits.sum().backward()
    assert model.model.embeddings.weight.grad[2].any()


# Streams


def _stream(model: LaCTForCausalLM, ids: Tensor, sizes: list[int], **call: Tensor) -> Tensor:
    state, logits, start = FastState(), [], 0
    for size in sizes:
        part = slice(start, start + size)
        own = {name: value[:, part] for name, value in call.items()}
        logits.append(model(ids[:, part], fast_state=state, **own).logits)
        state, start = state.advance(), start + size
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_stream_split_anywhere_equals_one_pass(variant: str) -> None:
    model, ids = lact_model(variant), token_ids()
    with torch.no_grad():
        expected = model(ids).logits
        for sizes in ([6, 9], [1] * LENGTH, [CHUNK, CHUNK, 7]):
            torch.testing.assert_close(_stream(model, ids, sizes), expected, **CLOSE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_before_a_changed_token_stay_bit_identical(variant: str) -> None:
    model, ids = lact_model(variant), token_ids()
    with torch.no_grad():
        before = model(ids).logits
        for t in (2, CHUNK, 9):
            other = ids.clone()
            other[:, t] = (other[:, t] + 1) % 40
            after = model(other).logits
            assert torch.equal(after[:, :t], before[:, :t])
            assert not torch.equal(after[:, t], before[:, t])


def _chunk(ids: Tensor, index: int, first: bool) -> dict[str, Any]:
    rows = tuple(range(len(ids)))
    plan = StreamPlan(rows, (index,) * len(ids), (first,) * len(ids))
    return {"stream_id": torch.tensor(rows), "is_first": torch.tensor(plan.is_first), "plan": plan}


def _step(model: LaCTForCausalLM, parts: list[Tensor], streams: StreamState, start: int) -> Tensor:
    streams.begin_step("train")
    loss = torch.zeros(())
    for index, part in enumerate(parts, start=start):
        handle = streams.begin(_chunk(part, index, index == 0))
        loss = loss + F.cross_entropy(
            model(part, fast_state=handle).logits.flatten(0, 1), part.flatten(), reduction="sum"
        )
    return loss


def _gradients(model: LaCTForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.quick("default", "muon", "stack3")
@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_of_a_step_have_the_gradients_of_one_pass_with_and_without_checkpointing(
    variant: str,
) -> None:
    model, ids = lact_model(variant).train(), token_ids()
    logits = model(ids).logits.flatten(0, 1)
    expected = _gradients(model, F.cross_entropy(logits, ids.flatten(), reduction="sum"))
    assert expected.keys() == dict(model.named_parameters()).keys()
    assert all(value.abs().max() > 1e-8 for value in expected.values())
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            newer = getattr(model, "activation_checkpointing_enable", None)
            (newer or model.gradient_checkpointing_enable)()
        loss = _step(model, list(ids.split([6, 4, 5], dim=1)), StreamState(), 0)
        found.append(_gradients(model, loss))
    torch.testing.assert_close(found[0], expected, **CLOSE)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_steps_that_commit_equal_one_pass_cut_where_they_end() -> None:
    model, ids = lact_model(), token_ids(length=20)
    streams = StreamState()
    _step(model, list(ids[:, :11].split([6, 5], dim=1)), streams, 0)
    streams.commit()
    learned = streams.slots("train")
    assert sorted(learned) == [f"layers.{i}.attn{end}" for i in range(2) for end in ("", ".window")]
    found = _gradients(model, _step(model, [ids[:, 11:]], streams, 2))
    handle = FastState(learned)
    loss = F.cross_entropy(
        model(ids[:, 11:], fast_state=handle).logits.flatten(0, 1),
        ids[:, 11:].flatten(),
        reduction="sum",
    )
    torch.testing.assert_close(found, _gradients(model, loss), rtol=0, atol=0)
    with torch.no_grad():
        whole = model(ids).logits[:, 11:]
        again = model(ids[:, 11:], fast_state=FastState(learned)).logits
    torch.testing.assert_close(again, whole, **CLOSE)


def test_learned_weights_keep_their_gradient_after_a_commit() -> None:
    model, ids = lact_model(), token_ids(length=20)
    streams = StreamState()
    _step(model, [ids[:, :11]], streams, 0)
    streams.commit()
    found = _gradients(model, _step(model, [ids[:, 11:]], streams, 1))
    for name in ("w0", "w1", "w2"):
        assert found[f"model.layers.1.attn.{name}"].abs().max() > 1e-6


def test_reading_without_adapting_leaves_what_was_learned_and_moves_on() -> None:
    model, ids = lact_model(), token_ids(length=20)
    with torch.no_grad():
        learned = FastState()
        model(ids[:, :10], fast_state=learned)
        reader = FastState(learned.outgoing, adapt=False)
        whole = model(ids[:, 10:], fast_state=reader).logits
        assert reader.outgoing == learned.outgoing
        state, logits = FastState(learned.outgoing, adapt=False), []
        for part in ids[:, 10:].split([3, 1, 6], dim=1):
            logits.append(model(part, fast_state=state).logits)
            state = state.advance()
        torch.testing.assert_close(torch.cat(logits, dim=1), whole, **CLOSE)
        adapting = model(ids[:, 10:], fast_state=FastState(learned.outgoing)).logits
    assert not torch.allclose(whole, adapting, rtol=1e-4, atol=1e-4)


def test_monitors_are_told_of_every_layer() -> None:
    model, handle = lact_model(), FastState.transient({"fast_weight", "inner_loss"})
    model(token_ids(), fast_state=handle)
    for topic in ("fast_weight", "inner_loss"):
        assert list(handle.published[topic]) == ["layers.0.attn", "layers.1.attn"]


# Masks, documents, inputs and outputs


@pytest.mark.parametrize("variant", VARIANTS)
def test_left_padding_and_packing_equal_rows_read_by_themselves(variant: str) -> None:
    model, ids = lact_model(variant), token_ids()
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :5] = 0
    documents = torch.tensor([[1] * 10 + [2] * 5, [4] * 3 + [7] * 12])
    with torch.no_grad():
        padded = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(padded[:1, 5:], model(ids[:1, 5:]).logits, **CLOSE)
        torch.testing.assert_close(padded[1:], model(ids[1:]).logits, **CLOSE)
        assert torch.equal(padded, model(ids, mask=mask.bool()).logits)
        packed = _stream(model, ids, [7, 8], document_ids=documents, mask=mask.bool())
        for row, start, end in ((0, 5, 10), (0, 10, 15), (1, 0, 3), (1, 3, 15)):
            alone = model(ids[row : row + 1, start:end]).logits
            torch.testing.assert_close(packed[row : row + 1, start:end], alone, **CLOSE)


def test_the_loss_is_that_of_the_shifted_labels_and_reaches_every_parameter() -> None:
    model, ids = lact_model().train(), token_ids()
    labels = ids.clone()
    labels[0, 4:6] = -100
    out = model(ids, labels=labels)
    targets = labels[:, 1:].flatten()
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), targets)
    torch.testing.assert_close(out.loss.float(), expected)
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_other_forms_of_inputs_and_outputs_give_the_same() -> None:
    model, ids = lact_model(), token_ids()
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
        logits = out.logits
        assert torch.equal(model(inputs_embeds=model.model.embeddings(ids)).logits, logits)
        last = model(ids, logits_to_keep=2).logits
        torch.testing.assert_close(last, logits[:, -2:], rtol=1e-14, atol=1e-14)
        chosen = model(ids, logits_to_keep=torch.tensor([0, 4])).logits
        torch.testing.assert_close(chosen, logits[:, [0, 4]], rtol=1e-14, atol=1e-14)
        assert torch.equal(model(ids, return_dict=False)[0], logits)
    assert len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[0], model.model.embeddings(ids))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), logits)


def test_forward_never_mutates_parameters_and_training_equals_evaluation() -> None:
    model, ids = lact_model(), token_ids()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_calls_that_cannot_be_meant_are_errors() -> None:
    model, ids = lact_model(), token_ids()
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(ids, inputs_embeds=model.model.embeddings(ids))
    for shape in ((2, 1, LENGTH, LENGTH), (2, LENGTH - 1), (1, LENGTH)):
        with pytest.raises(ValueError, match=r"attention_mask must have shape \[2, 15\]"):
            model(ids, attention_mask=torch.ones(shape))
    with pytest.raises(
        ValueError, match=r"DynamicCache, which has no place.*FastStateCache\(model"
    ):
        model(ids, past_key_values=DynamicCache(config=model.config))
    with pytest.raises(TypeError, match="position_ids"):
        model(ids, position_ids=torch.arange(LENGTH))
