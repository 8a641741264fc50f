"""Every variant: the card's own code, without lightning, equals the module bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from export_cases import CASES, save, trained
from export_readings import BY_POLICY, act, read
from safetensors import safe_open

from lightning_modules.export import export
from lightning_modules.policy import ActionExpertPolicy

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PROMPT = torch.tensor([[256, *b"The "]])
STOCK = {"lora_pretrained", "ttt_lora_pretrained", "ttt_lora_bfloat16", "memory_lora"}
STOCK |= {"lact", "none", "memory_vanilla"}
"""Cases whose files another library, or a class of its own, loads as they are."""

RUNNER = """
import contextlib, io, os, sys, torch
sys.modules["lightning"] = sys.modules["pytorch_lightning"] = None  # an import of it fails
from export_readings import BY_POLICY, act, read
from pathlib import Path
root, found = Path(sys.argv[1]), {}
for folder in sorted(root.iterdir()):
    os.chdir(folder)
    card = Path("README.md").read_text()
    codes = [part.split("```")[0] for part in card.split("```python\\n")[1:]]
    names, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(codes[0], names)
    found[folder.name] = result = {"printed": printed.getvalue()}
    if folder.name in BY_POLICY:
        result["actions"] = act(names["policy"])
        continue
    result["logits"], result["tokens"] = read(names["model"]), names["out"]
    if len(codes) > 1:
        exec(codes[1], names)
        result["stock"] = read(names["model"])
torch.save(found, sys.argv[2])
assert not any(name.split(".")[0] == "lightning" for name in sys.modules if sys.modules[name])
"""


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the modules compute; the exports lie in `folder`."""
    work = tmp_path_factory.mktemp("work")
    folder = work / "exports"
    results: dict[str, Any] = {"folder": folder}
    for name in CASES:
        module = trained(name, work)
        export(save(module, work / f"{name}.ckpt"), folder / name)
        if name in BY_POLICY:
            policy = ActionExpertPolicy.from_checkpoint(work / f"{name}.ckpt")
            results[name] = {"actions": act(policy)}
        else:
            tokens = module.generate(PROMPT, max_new_tokens=40)
            results[name] = {"logits": read(module.model), "tokens": tokens}
    return results


@pytest.fixture(scope="module")
def found(expected: dict[str, Any]) -> dict[str, Any]:
    """What the cards' code computes, in one process for all of them."""
    file = expected["folder"].parent / "found.pt"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(expected["folder"]), str(file)],
        env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(file)


@pytest.mark.parametrize("name", sorted(set(CASES) - BY_POLICY))
def test_a_language_model_reads_and_writes_as_the_module(
    name: str, expected: dict[str, Any], found: dict[str, Any]
) -> None:
    assert torch.equal(found[name]["logits"], expected[name]["logits"])
    assert torch.equal(found[name]["tokens"], expected[name]["tokens"])
    assert found[name]["printed"].startswith("The ")
    assert ("stock" in found[name]) == (name in STOCK)


@pytest.mark.parametrize("name", sorted(STOCK))
def test_other_libraries_load_the_same_model(
    name: str, expected: dict[str, Any], found: dict[str, Any]
) -> None:
    assert torch.equal(found[name]["stock"], expected[name]["logits"])


@pytest.mark.parametrize("name", sorted(BY_POLICY))
def test_a_policy_acts_as_that_of_the_checkpoint(
    name: str, expected: dict[str, Any], found: dict[str, Any]
) -> None:
    assert torch.equal(found[name]["actions"], expected[name]["actions"])
    assert expected[name]["actions"].std() > 0


def test_what_the_state_learned_matters(expected: dict[str, Any]) -> None:
    """Power: a state that was dropped between the chunks would be seen."""
    for name in ("lact", "ttt_lora", "in_place_pretrained"):
        ids = torch.randint(0, 256, (2, 2, 16), generator=torch.Generator().manual_seed(5))
        module = trained(name, expected["folder"].parent)
        with torch.no_grad():
            fresh = module.model(input_ids=ids[1], use_cache=False).logits
        assert not torch.equal(fresh, expected[name]["logits"][1])


def test_frozen_weights_of_a_base_are_not_in_the_export(expected: dict[str, Any]) -> None:
    for name in CASES:
        about = json.loads((expected["folder"] / name / "export.json").read_text())
        names = set()
        for file in (expected["folder"] / name).rglob("*.safetensors"):
            with safe_open(file, "pt") as data:
                names |= set(data.keys())
        assert names
        has_base = any(n.endswith("embed_tokens.weight") for n in names)
        referenced = about.get("base") is not None or name in ("pi0_pretrained", "lact")
        assert has_base != (referenced or name.startswith("expert")), name


def test_cards_say_what_was_trained_on_what(expected: dict[str, Any]) -> None:
    for name in CASES:
        card = (expected["folder"] / name / "README.md").read_text()
        head = yaml.safe_load(card.split("---\n")[1])
        assert head["library_name"] in ("transformers", "peft", "fast-weights")
        assert head["pipeline_tag"] == ("robotics" if name in BY_POLICY else "text-generation")
        assert "license" not in head, "the user's to choose"
        for title in ("What it is", "Load it", "Parameters", "Data", "Metrics", "Versions"):
            assert f"\n## {title}\n" in card
        assert "Not recorded" in card.split("## Metrics")[1]
        assert "step 7" in card
