"""The command exports, or says what is wrong before anything is written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from export_cases import FEATURES, base, save, trained
from export_readings import act, read
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lightning_modules.export.weights as weights
from lightning_modules.adapters.fingerprint import fingerprint
from lightning_modules.export.__main__ import main
from lightning_modules.export.snippets import loading
from lightning_modules.lact import LaCTModule
from lightning_modules.models.export_files import ABOUT
from lightning_modules.models.exported import load_language_model
from lightning_modules.policy import ActionExpertPolicy
from lightning_modules.ttt_lora import TTTLoRAModule


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def fails(capsys: pytest.CaptureFixture[str], *args: Path | str) -> str:
    """The last line of a command that must end with exit code 2."""
    assert main([str(arg) for arg in args]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_an_exported_model_equals_the_module_and_a_changed_weight_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = trained("lact", tmp_path)
    out = tmp_path / "deep" / "out"
    assert main([str(save(module, tmp_path / "a.ckpt")), str(out)]) == 0
    assert str(out / "README.md") in capsys.readouterr().out
    assert files(out) == {
        "README.md", "config.json", "export.json", "generation_config.json", "model.safetensors",
    }  # fmt: skip
    model = load_language_model(out)
    assert torch.equal(read(model), read(module.model))
    for ends in (module.model.generation_config, model.generation_config):
        assert (ends.bos_token_id, ends.eos_token_id, ends.pad_token_id) == (256, 257, 258)
    stored = load_file(out / "model.safetensors")
    stored["model.norm.weight"][0] += 1
    save_file(stored, out / "model.safetensors", {"format": "pt"})
    assert not torch.equal(read(load_language_model(out)), read(module.model))


def test_an_exported_policy_acts_as_the_checkpoints(tmp_path: Path) -> None:
    path = save(trained("expert_carried", tmp_path), tmp_path / "a.ckpt")
    assert main([str(path), str(tmp_path / "out")]) == 0
    assert files(tmp_path / "out") == {"README.md", "export.json", "model.safetensors"}
    policy = ActionExpertPolicy.from_export(tmp_path / "out")
    assert torch.equal(act(policy), act(ActionExpertPolicy.from_checkpoint(path)))
    with pytest.raises(ValueError, match="ActionExpertModule: load it with ActionExpertPolicy"):
        load_language_model(tmp_path / "out")


def test_normalisation_is_part_of_an_exported_policy(tmp_path: Path) -> None:
    module = trained("expert", tmp_path)
    module.normalization = "z_score"
    spread = {"mean": [0.1, 0.2, 0.3, 0.4, 0.5], "std": [1.1, 1.2, 1.3, 1.4, 1.5]}
    action = {key: values[:3] for key, values in spread.items()}
    module.build(module.features, {"observation.state": spread, "action": action})
    path = save(module, tmp_path / "a.ckpt")
    assert main([str(path), str(tmp_path / "out")]) == 0
    policy = ActionExpertPolicy.from_export(tmp_path / "out")
    assert torch.equal(act(policy), act(ActionExpertPolicy.from_checkpoint(path)))
    about = json.loads((tmp_path / "out" / ABOUT).read_text())
    about["normalization"]["action_shift"][0] += 1
    (tmp_path / "out" / ABOUT).write_text(json.dumps(about))
    changed = act(ActionExpertPolicy.from_export(tmp_path / "out"))
    assert not torch.equal(changed, act(policy)), "power: the numbers are used"


def test_adapters_refuse_another_base_and_find_one_that_has_moved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = trained("lora_pretrained", tmp_path)
    path = save(module, tmp_path / "a.ckpt")
    assert main([str(path), str(tmp_path / "out")]) == 0
    moved = tmp_path / "moved"
    (tmp_path / "qwen3").rename(moved)
    with pytest.raises(ValueError, match=r"qwen3' of the export's adapters cannot be .*pass base="):
        load_language_model(tmp_path / "out")
    assert torch.equal(read(load_language_model(tmp_path / "out", str(moved))), read(module.model))
    wrong = AutoModelForCausalLM.from_pretrained(moved)
    with torch.no_grad():
        wrong.model.norm.weight += 1
    with pytest.raises(ValueError, match="the given Qwen3ForCausalLM has other weights .* pass"):
        load_language_model(tmp_path / "out", wrong)
    assert "cannot be loaded" in fails(capsys, path, tmp_path / "b")
    assert main([str(path), str(tmp_path / "b"), "--pretrained", str(moved)]) == 0
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(moved)


def test_what_cannot_be_exported_is_an_error_and_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert "does not exist: name the file" in fails(capsys, tmp_path / "a.ckpt", out)
    assert "is a folder" in fails(capsys, tmp_path, out)
    (tmp_path / "b.ckpt").write_text("text")
    assert "cannot be read as a checkpoint" in fails(capsys, tmp_path / "b.ckpt", out)
    torch.save({"state_dict": {}}, tmp_path / "c.ckpt")
    assert "checkpoint of none of ActionExpertModule, LaCT" in fails(
        capsys, tmp_path / "c.ckpt", out
    )
    frozen = TTTLoRAModule(torch.optim.AdamW, method="none", pretrained=base(tmp_path))
    frozen.build(FEATURES)
    assert "nothing was trained" in fails(capsys, save(frozen, tmp_path / "d.ckpt"), out)
    path = save(trained("lact", tmp_path), tmp_path / "e.ckpt")
    assert "has all of its weights" in fails(capsys, path, out, "--pretrained", "x")
    assert not [p for p in tmp_path.iterdir() if "out" in p.name], "nothing, and no leftovers"

    def broken(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(weights, "_save_language", broken)
    assert fails(capsys, path, out) == "error: disk full"
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]
    out.mkdir()
    (out / "mine").write_text("kept")
    assert "is not empty: save the export into a new folder" in fails(capsys, path, out)
    assert files(out) == {"mine"}


def test_the_docs_show_the_cards_code() -> None:
    docs = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    shown = docs.split("```python\n")[1].split("```")[0]
    card = loading({"layout": "model"}, FEATURES, tokenizer=False)
    without = [re.sub(r"  #.*", "", code.replace('"."', '"exported"')) for code in (shown, card)]
    assert without[0] == without[1]


def test_a_card_names_a_hub_base_and_uses_the_runs_tokenizer() -> None:
    about = {"layout": "model"}
    text = {**FEATURES, "tokenizer": "org/model", "bos_id": None}
    assert 'from_pretrained("org/model")' in loading(about, text, tokenizer=False)
    assert 'from_pretrained(".")' in loading(about, text, tokenizer=True)
    assert "[1, 2, 3]" in loading(about, {**FEATURES, "tokenizer": "bpe", "bos_id": None}, False)
    assert "apply_chat_template" in loading(about, {**text, "mode": "chat"}, tokenizer=True)


def test_an_export_of_another_version_or_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no export\.json: give a folder that"):
        load_language_model(tmp_path)
    (tmp_path / ABOUT).write_text('{"format": 99}')
    with pytest.raises(ValueError, match="has format 99, this version reads up to 1: update"):
        load_language_model(tmp_path)


def test_a_checkpoint_with_the_older_fingerprint_is_still_accepted(tmp_path: Path) -> None:
    module = trained("lora_pretrained", tmp_path)
    path = save(module, tmp_path / "a.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    older = fingerprint(module.left_out.named(module.model))
    assert checkpoint["TTTLoRAModule"]["fingerprint"] != older
    checkpoint["TTTLoRAModule"]["fingerprint"] = older
    TTTLoRAModule.rebuild(checkpoint)
    checkpoint["TTTLoRAModule"]["fingerprint"] = "0" * 16
    with pytest.raises(ValueError, match="other pretrained weights"):
        TTTLoRAModule.rebuild(checkpoint)


def test_a_rebuilt_module_does_not_train(tmp_path: Path) -> None:
    path = save(trained("lact", tmp_path), tmp_path / "a.ckpt")
    module = LaCTModule.rebuild(torch.load(path, weights_only=True))
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    with pytest.raises(RuntimeError, match="rebuilt from a checkpoint has no optimizer"):
        module.optimizer_factory([])


@pytest.mark.slow
def test_what_loads_an_export_does_not_load_lightning() -> None:
    code = (
        "import sys, lightning_modules.policy, lightning_modules.models.exported;"
        "print({'lightning', 'peft', 'tensorboard', 'datasets'} & set(sys.modules))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
