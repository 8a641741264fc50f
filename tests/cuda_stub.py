"""Triton's own compiler and launcher over a CUDA driver that does nothing (`cuda_stub.c`).

For a process of its own, without TRITON_INTERPRET: `install(folder)` before kernels are launched.
What is computed is without meaning then; what kernels are launched with is not.
"""

import ctypes
import os
import subprocess
from pathlib import Path
from typing import Any

MOST = 128
"""Parameters that the stub keeps."""


class Stub:
    """The driver's side of launches.

    Args:
        library: the compiled stub.
    """

    def __init__(self, library: Path) -> None:
        # By its soname the loader then takes it for the real one.
        self.library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

    def expect(self, sizes: list[int]) -> None:
        """How many bytes each parameter of the launches to come has."""
        self.library.expect(len(sizes), (ctypes.c_int * len(sizes))(*sizes))

    def taken(self, sizes: list[int]) -> tuple[list[int], int]:
        """Parameters of the last launch as integers, and the number of launches so far."""
        room = (ctypes.c_ubyte * (8 * MOST))()
        launches = self.library.taken(room)
        places = enumerate(sizes)
        return [
            int.from_bytes(bytes(room[8 * i : 8 * i + n]), "little") for i, n in places
        ], launches


def install(folder: Path) -> Stub:
    """Compile the stub, load it, and let Triton launch on it for compute capability 9.0."""
    library = folder / "libcuda.so.1"
    source = Path(__file__).with_suffix(".c")
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source]
    subprocess.run(command, check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    stub = Stub(library)

    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
    from triton.runtime import driver

    class Driver(CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device=0: (9, 0)

    driver.set_active(Driver())
    return stub


def compare_launches(stub: Stub) -> list[str]:
    """Check each launch from now on against Triton's binder; returns the kernels' names as they go.

    A launch by `Launcher` must hand the driver what `kernel[grid](...)` does, all of it and in
    the same order, and that must be the pointers of the tensors and the numbers.
    """
    from lightning_modules.ops.launcher import Launcher

    launch, names = Launcher.__call__, []

    def call(self: Any, grid: Any, tensors: Any, numbers: Any, options: Any) -> None:
        values = [*(x.data_ptr() for x in tensors), *numbers]
        stub.expect([])  # those of this kernel are not known before it is compiled
        compiled = self.kernel[grid](*tensors, *numbers, **options)
        signature = [compiled.src.signature[name] for name in self.kernel.arg_names]
        live = [i for i in range(len(values)) if signature[i] != "constexpr"]
        sizes = [8 if i < len(tensors) or signature[i] == "i64" else 4 for i in live]
        stub.expect(sizes)
        self.kernel[grid](*tensors, *numbers, **options)
        by_binder, before = stub.taken(sizes)
        launch(self, grid, tensors, numbers, options)  # it may compile: then the next one is it
        launch(self, grid, tensors, numbers, options)
        by_launcher, after = stub.taken(sizes)
        assert after == before + 2 and by_launcher == by_binder, self.kernel.__name__
        integers = {j: values[i] for j, i in enumerate(live) if signature[i] != "fp32"}
        assert {j: by_launcher[j] for j in integers} == integers, self.kernel.__name__
        names.append(self.kernel.__name__)

    Launcher.__call__ = call  # type: ignore[method-assign]
    return names
