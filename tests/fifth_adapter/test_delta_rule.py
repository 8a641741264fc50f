"""The fifth adapter is right, and nothing of the library had to change for it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architecture_cases import AdapterCase
from capabilities import CAPABILITIES
from fifth_adapter import delta_rule as fifth
from fifth_adapter.delta_rule import DeltaState, delta_rule
from torch import Tensor

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
"""float64: sums in another order."""

BATCH, TIME, HEADS, SIZE = 3, 23, 2, 5


def inputs(seed: int = 0) -> dict[str, Tensor]:
    """Random tokens, padded anywhere, of up to four documents a row."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, BATCH, TIME, HEADS, SIZE, generator=g, dtype=torch.float64)
    return {
        "q": q,
        "k": torch.nn.functional.normalize(k, dim=-1),
        "v": v,
        "beta": torch.rand(BATCH, TIME, HEADS, generator=g, dtype=torch.float64),
        "mask": torch.rand(BATCH, TIME, generator=g) > 0.2,
        "document_ids": torch.randint(0, 2, (BATCH, TIME), generator=g).cumsum(1) // 6,
    }


def naive(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, mask: Tensor, document_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, token by token: outputs, and S of every row."""
    o, memories = torch.zeros_like(q), []
    for b in range(len(q)):
        memory, document = q.new_zeros(HEADS, SIZE, SIZE), None
        for t in range(q.shape[1]):
            if not mask[b, t]:
                continue
            if document is not None and document_ids[b, t] != document:
                memory = torch.zeros_like(memory)
            document = document_ids[b, t]
            answer = torch.einsum("hd,hde->he", k[b, t], memory)
            wrong = beta[b, t].unsqueeze(-1) * (v[b, t] - answer)
            memory = memory + torch.einsum("hd,he->hde", k[b, t], wrong)
            o[b, t] = torch.einsum("hd,hde->he", q[b, t], memory)
        memories.append(memory)
    return o, torch.stack(memories)


def part(tokens: dict[str, Tensor], where: slice) -> dict[str, Tensor]:
    return {name: x[:, where] for name, x in tokens.items()}


@pytest.mark.parametrize("chunk", [1, 4, 8, 64])
def test_outputs_memory_and_gradients_are_those_of_the_loop(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fifth, "CHUNK", chunk)
    found, expected = [], []
    for results, function in ((found, delta_rule), (expected, naive)):
        tokens = inputs()
        learned = [tokens[name].requires_grad_() for name in ("q", "k", "v", "beta")]
        o, state = function(**tokens)
        memory = state.memory if isinstance(state, DeltaState) else state
        (o.sin().sum() + memory.cos().sum()).backward()
        results += [o, memory, *(x.grad for x in learned)]
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, **CLOSE)


@pytest.mark.parametrize("cut", [1, 7, 16, 22])
def test_two_passes_are_one(cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fifth, "CHUNK", 4)
    tokens = inputs()
    o, state = delta_rule(**tokens)
    first, carried = delta_rule(**part(tokens, slice(cut)))
    second, carried = delta_rule(**part(tokens, slice(cut, None)), state=carried)
    torch.testing.assert_close(torch.cat([first, second], dim=1), o, **CLOSE)
    torch.testing.assert_close(carried, state, **CLOSE)


def test_a_memory_that_is_shared_by_the_rows_or_not_reset_is_noticed() -> None:
    tokens = inputs()
    o, _ = delta_rule(**tokens)
    kept, _ = delta_rule(**{**tokens, "document_ids": torch.zeros_like(tokens["document_ids"])})
    assert not torch.allclose(o, kept, **CLOSE)
    _, state = delta_rule(**part(tokens, slice(7)))
    second, _ = delta_rule(**part(tokens, slice(7, None)), state=state)
    mixed = state._replace(memory=state.memory.mean(0, keepdim=True).expand_as(state.memory))
    other, _ = delta_rule(**part(tokens, slice(7, None)), state=mixed)
    assert not torch.allclose(second, other, **CLOSE)


def test_the_future_changes_nothing() -> None:
    tokens = inputs()
    o, _ = delta_rule(**tokens)
    changed = {**tokens, "v": tokens["v"].clone()}
    changed["v"][:, 15] += 1
    other, _ = delta_rule(**changed)
    assert torch.equal(o[:, :15], other[:, :15])
    assert not torch.equal(o[:, 15:], other[:, 15:])


CASE = AdapterCase("delta_rule", {"num_heads": 2}, {"num_heads": 2, "alpha_init": 0.0}, True)


@pytest.mark.parametrize("capability", [c for c in CAPABILITIES if c != "compile"])
def test_capability_in_a_pretrained_architecture(capability: str) -> None:
    CAPABILITIES[capability]("qwen3", CASE)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mistral"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_capability_elsewhere(capability: str, architecture: str) -> None:
    CAPABILITIES[capability](architecture, CASE)


@pytest.mark.slow
def test_it_trains_from_the_command_line_and_acts(tmp_path: Path) -> None:
    script = tmp_path / "my_cli.py"
    script.write_text("import fifth_adapter.delta_rule\nfrom cli import main\n\nmain()\n")
    files = [ROOT / "configs" / "quickstart.yaml", ROOT / "configs" / "tiny" / "action_expert.yaml"]
    configs = [part for f in [*files, HERE / "delta_rule.yaml"] for part in ("--config", str(f))]
    done = subprocess.run(
        [sys.executable, str(script), "fit", *configs],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    [checkpoint] = tmp_path.glob("runs/quickstart/version_0/checkpoints/last.ckpt")
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert any("qkv" in name for name in weights)


def test_the_guide_shows_what_runs() -> None:
    guide = (ROOT / "docs" / "new_adapter.md").read_text()
    shown = re.findall(r"^```(?:python|yaml)\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)
    sources = [(HERE / f).read_text() for f in ("delta_rule.py", "delta_rule.yaml", Path(__file__))]
    elsewhere = [piece for piece in shown if not any(piece in source for source in sources)]
    assert len(shown) == 8
    assert [piece.splitlines()[0] for piece in elsewhere] == [
        'inject_adapters(model, [("*", "delta_rule", {"num_heads": 2})])',
        "import delta_rule",
    ]
