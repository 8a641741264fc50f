"""The ops are pure tensor functions: importing them must stay cheap."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("lightning", "pytorch_lightning", "transformers", "peft", "datasets", "triton")


def _loaded_after(statement: str) -> set[str]:
    """Top-level packages in `sys.modules` after a statement, in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.slow
@pytest.mark.parametrize("package", HEAVY)
def test_ops_import_loads_torch_only(loaded_by_ops: set[str], package: str) -> None:
    assert "torch" in loaded_by_ops
    assert package not in loaded_by_ops


@pytest.fixture(scope="module")
def loaded_by_ops() -> set[str]:
    return _loaded_after("import lightning_modules.ops")


def test_package_has_no_attribute_that_is_not_a_module() -> None:
    import lightning_modules

    with pytest.raises(AttributeError, match="NoSuchModule"):
        _ = lightning_modules.NoSuchModule
