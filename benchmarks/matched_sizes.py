"""Which inner sizes give TTT-LoRA the parameters of a LoRA, in the linear layers of two models.

python benchmarks/matched_sizes.py
"""

from __future__ import annotations

from lightning_modules.layers.ttt_lora_size import (
    match_lora,
    match_lora_siblings,
    parameter_count,
)

MODELS = {
    "SmolLM2-135M": (576, 576, 192, 1536, 30),
    "Qwen3-0.6B": (1024, 2048, 1024, 3072, 28),
}
"""Hidden size, size of all queries, size of all keys, size of the MLP, layers."""


def families(hidden: int, q: int, kv: int, mlp: int) -> dict[str, list[tuple[int, int]]]:
    """(in, out) of the linear layers that read the same input."""
    return {
        "q, k, v": [(hidden, q), (hidden, kv), (hidden, kv)],
        "o": [(q, hidden)],
        "gate, up": [(hidden, mlp), (hidden, mlp)],
        "down": [(mlp, hidden)],
    }


def main() -> None:
    """Print a table."""
    print("| model | rank | layers | d by itself | one d for all | parameters | LoRA's |")
    print("|---|---|---|---|---|---|---|")
    for model, (*sizes, layers) in MODELS.items():
        for rank in (16, 64):
            total, budget = 0, 0
            for name, shapes in families(*sizes).items():
                alone = ", ".join(str(match_lora(rank, *shape)) for shape in shapes)
                size = match_lora_siblings(rank, shapes)
                count = sum(parameter_count(*shape, size) for shape in shapes)
                lora = rank * sum(map(sum, shapes))
                total, budget = total + layers * count, budget + layers * lora
                row = (model, rank, name, alone, size, f"{count:,}", f"{lora:,}")
                print(f"| {' | '.join(map(str, row))} |")
            print(f"| {model} | {rank} | all of {layers} layers | | | {total:,} | {budget:,} |")


if __name__ == "__main__":
    main()
