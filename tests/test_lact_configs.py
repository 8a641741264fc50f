"""LaCT's configs: run, shortened, from the command line; the large one is built on meta."""

from pathlib import Path

import pytest
import torch
import yaml
from config_cases import CONFIGS, fit_validate_resume, run_folder
from lact_module_cases import save_pretrained

from lightning_modules.lact import LaCTModule

TINY = CONFIGS / "tiny" / "text.yaml"
SMALLER = {
    "lact_small": [],
    "lact_recall": ["--data.val_sequences", "4", "--data.train_sequences", "100"],
    "lact_stacked": ["--data.chunk_length", "512", "--model.init_args.config.num_hidden_layers=2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLER)
def test_config_fits_validates_and_goes_on_from_its_checkpoint(
    name: str, run_cli, tmp_path: Path
) -> None:
    options = ["--config", str(CONFIGS / f"{name}.yaml"), "--config", str(TINY), *SMALLER[name]]
    events = fit_validate_resume(run_cli, options, run_folder(tmp_path, name))
    written = set(events.Tags()["scalars"])
    assert {"train/loss", "val/loss", "val/accuracy", "throughput/tokens_per_sec"} <= written
    assert {"fast_weight/state_norm/layer_00", "fast_weight/inner_loss_after/layer_01"} <= written
    assert any(tag.startswith("position_loss/from_") for tag in written)
    assert "position_loss/curve" in events.Tags()["images"]


def test_760m_has_exactly_the_published_number_of_parameters() -> None:
    options = yaml.safe_load((CONFIGS / "lact_760m.yaml").read_text())
    length = options["data"]["init_args"]["chunk_length"]
    with torch.device("meta"):
        module = LaCTModule(torch.optim.AdamW, config=options["model"]["init_args"]["config"])
        module.build({"vocab_size": 32_000, "chunk_length": length, "tbptt": 1, "mode": "packed"})
    assert sum(p.numel() for p in module.parameters()) == 797_625_312


@pytest.mark.slow
def test_branches_beside_a_pretrained_model_are_all_that_a_checkpoint_holds(
    run_cli, tmp_path: Path
) -> None:
    folder = save_pretrained(tmp_path)
    options = ["--config", str(CONFIGS / "lact_smollm2.yaml"), "--config", str(TINY)]
    options += ["--model.init_args.pretrained.name", folder, "--trainer.precision", "32-true"]
    options += ["--data.tokenizer.kind", "bytes", "--data.tokenizer.name", "null"]
    options += ["--data.chunk_length", "64", "--data.min_tokens", "8192"]
    adapter = "{memory: {num_lact_heads: 2}, update: {lact_chunk_size: 16}, alpha_init: 0.0}"
    line = f"[{{pattern: '*', adapter_type: lact, adapter_config: {adapter}}}]"
    options += ["--model.init_args.adapters", line]
    result = run_cli("fit", *options)
    assert result.code == 0, result.err
    path = run_folder(tmp_path, "lact_smollm2") / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["state_dict"]
    assert all(".lact." in key or ".lact_gate." in key for key in checkpoint["state_dict"])
    groups = {g["name"].split("/")[0] for g in checkpoint["optimizer_states"][0]["param_groups"]}
    assert groups == {"adapter", "gate", "fast"}
    assert run_cli("validate", *options, "--ckpt_path", str(path)).code == 0
    resumed = run_cli("fit", *options, "--ckpt_path", str(path), "--trainer.max_steps", "6")
    assert resumed.code == 0, resumed.err
