"""FLOPs of a step are those by hand; counting costs no memory and changes no number of a run."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import pytest
import torch
from variant_cases import assert_same, every_variant, train

from callbacks import Throughput
from callbacks.flops import count_step
from lightning_modules import TTTLoRAModule

LAYERS, HIDDEN, INNER, HEADS, VOCABULARY = 2, 32, 48, 4, 50
LLAMA = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
}


def test_language_model_has_six_for_each_weight_and_token_and_its_attention() -> None:
    rows, time = 2, 16
    module = TTTLoRAModule(partial(torch.optim.AdamW, lr=1e-3), method="none", config=LLAMA)
    module.build({"vocab_size": VOCABULARY, "chunk_length": time, "tbptt": 1, "mode": "stream"})
    ids = torch.randint(0, VOCABULARY, (rows, time))
    chunk = {"input_ids": ids, "labels": ids, "mask": torch.ones(rows, time, dtype=torch.bool)}
    weights = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * INNER) + HIDDEN * VOCABULARY
    attention = LAYERS * 2 * 2 * rows * time**2 * HIDDEN
    expected = 6 * weights * rows * time + 3 * attention
    assert count_step(module, [chunk]) == expected
    assert count_step(module, [chunk, chunk]) == 2 * expected


@every_variant
def test_counting_changes_no_bit_of_a_run_and_is_not_seen(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = train(name, tmp_path, steps=2)
    with caplog.at_level(logging.INFO):
        counted = train(name, tmp_path, steps=2, callbacks=lambda: [Throughput()])
    assert "meta" not in caplog.text
    assert_same(counted, plain)
    assert counted[0].flops_per_batch > 0
    assert all(x.device.type == "cpu" for x in counted[0].state_dict().values())


class LooksAtNumbers(TTTLoRAModule):
    """Whose steps depend on values."""

    def chunk_loss(self, chunk, fast_state, generator):  # type: ignore[no-untyped-def]
        return super().chunk_loss(chunk, fast_state, generator) * int(chunk["labels"].max() > -2)


def test_step_that_looks_at_numbers_has_no_count(caplog: pytest.LogCaptureFixture) -> None:
    module = LooksAtNumbers(partial(torch.optim.AdamW, lr=1e-3), method="none", config=LLAMA)
    module.build({"vocab_size": VOCABULARY, "chunk_length": 8, "tbptt": 1, "mode": "stream"})
    ids = torch.randint(0, VOCABULARY, (2, 8))
    with caplog.at_level(logging.INFO):
        assert count_step(module, [{"input_ids": ids, "labels": ids}]) is None
    assert "not counted" in caplog.text
