"""Pure tensor functions: each op is a folder with a readable loop and fast backends.

Importing this package loads torch only.
"""

from lightning_modules.ops.chapter_attention import chapter_attention
from lightning_modules.ops.in_place import in_place
from lightning_modules.ops.lact import lact
from lightning_modules.ops.quantize import dequantize_rows, quantize_rows
from lightning_modules.ops.states import (
    InPlaceState,
    LaCTState,
    TTTLinearState,
    TTTLoRAState,
    TTTMLPState,
)
from lightning_modules.ops.ttt_linear import ttt_linear
from lightning_modules.ops.ttt_lora import ttt_lora, ttt_lora_cell
from lightning_modules.ops.ttt_mlp import ttt_mlp

__all__ = [
    "InPlaceState",
    "LaCTState",
    "TTTLinearState",
    "TTTLoRAState",
    "TTTMLPState",
    "chapter_attention",
    "dequantize_rows",
    "in_place",
    "lact",
    "quantize_rows",
    "ttt_linear",
    "ttt_lora",
    "ttt_lora_cell",
    "ttt_mlp",
]
