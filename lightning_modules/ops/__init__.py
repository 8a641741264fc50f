"""Pure tensor functions: each op is a folder with a readable loop and fast backends.

Importing this package loads torch only.
"""

from lightning_modules.ops.lact import lact
from lightning_modules.ops.states import LaCTState, TTTLinearState, TTTMLPState
from lightning_modules.ops.ttt_linear import ttt_linear
from lightning_modules.ops.ttt_mlp import ttt_mlp

__all__ = ["LaCTState", "TTTLinearState", "TTTMLPState", "lact", "ttt_linear", "ttt_mlp"]
