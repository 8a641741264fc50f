"""Kernels compiled for a GPU that is not there: `with record() as compiled:` around their launches.

Tensors may be on the device "meta". Needs a process without TRITON_INTERPRET.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}


SHARED = 227 * 1024
"""Bytes of shared memory that a program can have."""


class Compiled(NamedTuple):
    """What ptxas says of a kernel for sm_90a: registers of a thread, bytes spilled and shared."""

    name: str
    registers: int
    spilled: int
    shared: int


def compiled_by(code: str) -> list[Compiled]:
    """Kernels that a program prints."""
    return [Compiled(*found) for found in printed_by(code)]


def printed_by(code: str) -> Any:
    """What a program prints as JSON, run without TRITON_INTERPRET."""
    folder = Path(__file__).parent
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (folder, folder.parent)))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@contextmanager
def record() -> Iterator[list[Compiled]]:
    """Compile kernels instead of launching them."""
    found: list[Compiled] = []
    launch = JITFunction.__getitem__

    def instead(kernel: JITFunction, grid: Any) -> Any:
        return lambda *given, **named: found.append(compile_call(kernel, given, named))

    JITFunction.__getitem__ = instead
    try:
        yield found
    finally:
        JITFunction.__getitem__ = launch


def compile_call(kernel: JITFunction, given: tuple[Any, ...], named: dict[str, Any]) -> Compiled:
    """Compile a kernel for these arguments as a launch would."""
    values = dict(zip(kernel.arg_names, given, strict=False)) | named
    options = {n: values.pop(n) for n in ("num_warps", "num_stages") if n in values}
    assert values.keys() == set(kernel.arg_names), kernel.__name__
    types, constants, attributes = {}, {}, {}
    for i, p in enumerate(kernel.params):
        value = values[p.name]
        free = p.do_not_specialize
        if torch.is_tensor(value):
            types[p.name], attributes[i,] = TYPES[value.dtype], [["tt.divisibility", 16]]
        elif p.is_constexpr or value is None or (value == 1 and not free):
            types[p.name], constants[i,] = "constexpr", value
        else:
            types[p.name] = "i32"
            if value % 16 == 0 and not free:
                attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, types, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(made.asm["ptx"])
        file.flush()
        program = triton.knobs.nvidia.ptxas.path
        command = [program, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", said)[1])
    spilled = int(re.search(r"(\d+) bytes spill stores", said)[1])
    return Compiled(kernel.__name__, registers, spilled, made.metadata.shared)
