"""Train a small language model from scratch and save it as a folder of the hub.

    python benchmarks/pretrain.py --config configs/memory_scratch.yaml --out base \\
        --set model.init_args.arm=vanilla trainer.max_steps=2000

The folder holds weights (bfloat16, in files of at most 15 MB), configuration, tokenizer and
`training.json`: where, with what and on which texts it was trained, and its last validation loss.
What adapters are compared on must not depend on a download.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import yaml
from language_run import text_data, train
from training_runs import changes_of, set_value, write_config, write_json

from lightning_modules import MemoryBankModule


def main() -> None:
    """Train, and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="of a model from scratch")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--accelerator", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())
    kept = ("ModelCheckpoint", "Throughput")
    callbacks = [c for c in config["trainer"]["callbacks"] if c["class_path"] in kept]
    settings = {
        "trainer.callbacks": callbacks,
        "trainer.enable_progress_bar": False,
        "trainer.logger.init_args.save_dir": str(options.out.resolve()),
        "trainer.logger.init_args.name": "log",
        "trainer.logger.init_args.version": "",
        **changes_of(options),
    }
    for key, value in settings.items():
        set_value(config, key, value)
    write_config(config, options.out)
    train(options.out)
    save(options.out)


def save(folder: Path) -> None:
    """Weights of the last checkpoint and the tokenizer, as transformers reads them."""
    last = folder / "log" / "checkpoints" / "last.ckpt"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    data = text_data(config)
    if data is None or config["model"]["class_path"] != "MemoryBankModule":
        raise SystemExit("pretrain.py takes a MemoryBankModule (arm vanilla) on texts")
    options = config["model"]["init_args"]
    module = MemoryBankModule(torch.optim.AdamW, arm="vanilla", config=options["config"])
    module.build(data.features)
    module.load_state_dict(torch.load(last, map_location="cpu", weights_only=True)["state_dict"])
    module.model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="15MB")
    data.tokenizer.save(folder)
    write_json(folder / "provenance.json", data.provenance)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
