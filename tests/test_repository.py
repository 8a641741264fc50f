"""Conventions of the repository, enforced: sizes, direction of imports, pinned versions."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from configparser import ConfigParser
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGES = ("lightning_modules", "datamodules", "callbacks")
SOURCES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
VARIANTS = ("action_expert", "lact", "memory_bank", "ttt_lora")
STDLIB = tuple(sys.stdlib_module_names)

# Folder -> prefixes of modules that its files may not import.
FORBIDDEN = {
    "lightning_modules": ("callbacks", "datamodules", "benchmarks", "cli"),
    "lightning_modules/layers": (
        "lightning.",
        "transformers",
        "lightning_modules.adapters",
        "lightning_modules.models",
        "lightning_modules.base",
    ),
    "lightning_modules/adapters": ("lightning.", "lightning_modules.base"),
    "lightning_modules/models": ("lightning.", "lightning_modules.base"),
    "datamodules": ("callbacks", "benchmarks", "cli"),
    "callbacks": ("benchmarks", "cli"),
}


def read_setup() -> ConfigParser:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return setup


def imported(path: Path) -> set[str]:
    """Dotted names of a file's imports (`from a import b` is `a.b`), each ending in a dot."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {f"{alias.name}." for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}." for alias in node.names}
    return names


def below(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def relative(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


# --- size ---


def test_no_file_is_longer_than_400_lines() -> None:
    files = [*SOURCES, *TESTS, *ROOT.glob("*.py"), *ROOT.glob("*.md"), *below("benchmarks")]
    long = {path: len(path.read_text().splitlines()) for path in files}
    assert not {str(path): lines for path, lines in long.items() if lines > 400}
    assert len((ROOT / "cli.py").read_text().splitlines()) < 200


def test_no_function_is_longer_than_50_lines() -> None:
    long = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - _first_statement(node) + 1
                if lines > 50:
                    long.append(f"{path.relative_to(ROOT)}: {node.name} has {lines} lines")
    assert not long


def _first_statement(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Line of the first statement after the docstring, which is documentation, not length."""
    has_text = ast.get_docstring(function) is not None and len(function.body) > 1
    return function.body[1 if has_text else 0].lineno


def test_nothing_is_left_to_do() -> None:
    marker = re.compile(r"\b(TODO|FIXME|XXX)\b")
    assert not [path for path in relative(SOURCES) if marker.search((ROOT / path).read_text())]


# --- structure ---


def test_every_package_folder_has_an_init() -> None:
    folders = {path.parent for path in SOURCES}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").exists()]


def test_test_files_have_unique_names_and_no_init() -> None:
    names = [path.name for path in TESTS if path.name != "conftest.py"]
    assert not {name for name in names if names.count(name) > 1}
    assert "__init__.py" not in names


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_point_one_way(folder: str) -> None:
    prefixes = FORBIDDEN[folder]
    wrong = {
        f"{path.relative_to(ROOT)} imports {name.rstrip('.')}"
        for path in below(folder)
        for name in imported(path)
        if any(name.startswith(prefix.rstrip(".") + ".") for prefix in prefixes)
    }
    assert not wrong


def test_ops_import_torch_and_triton_only() -> None:
    allowed = (*STDLIB, "torch", "triton", "lightning_modules.ops")
    wrong = {
        f"{path.relative_to(ROOT)} imports {name.rstrip('.')}"
        for path in below("lightning_modules/ops")
        for name in imported(path)
        if not any(name.startswith(f"{prefix}.") for prefix in allowed)
    }
    assert not wrong


def test_triton_is_imported_lazily() -> None:
    for path in SOURCES:
        if path.name == "kernels.py" or path.parent.name == "kernels":  # imported when asked for
            continue
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "triton" for name in names), path


def test_callbacks_and_datamodules_know_no_variant() -> None:
    prefixes = tuple(f"lightning_modules.{variant}." for variant in VARIANTS)
    import lightning_modules

    prefixes += tuple(f"lightning_modules.{name}." for name in lightning_modules.__all__)
    paths = [*below("callbacks"), *below("datamodules")]
    assert not [path for path in paths if any(n.startswith(prefixes) for n in imported(path))]


def test_ops_and_layers_load_neither_lightning_nor_transformers() -> None:
    code = (
        "import sys, lightning_modules.ops, lightning_modules.layers;"
        "print({'lightning', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


LATE = {
    ("lightning_modules.models.pi0_options", "lightning_modules.models.pi0"),
    ("lightning_modules.policy", "lightning_modules.action_expert"),
}
"""Options that build a model, and a policy that rebuilds its module, know who is made of them."""


def names_of_modules() -> dict[str, Path]:
    files = [*SOURCES, ROOT / "cli.py"]
    dotted = {p: ".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files}
    return {name.removesuffix(".__init__"): path for path, name in dotted.items()}


def imports_between_modules() -> dict[str, set[str]]:
    """Own modules that each own module imports when it runs, also inside functions."""
    modules = names_of_modules()
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        tree = ast.parse(path.read_text())
        for block in ast.walk(tree):
            if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test):
                block.body = []
        found = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= (full & modules.keys()) or {node.module or ""}
        graph[module] = {name for name in found & modules.keys() if (module, name) not in LATE}
        graph[module] -= {module}
    return graph


def test_no_module_imports_itself_through_others() -> None:
    graph = imports_between_modules()
    assert sum(map(len, graph.values())) > 500, "imports are not found"
    TopologicalSorter(graph).prepare()  # raises with the cycle


FAST_STATE = ("fast_state", "slots", "stream_rows", "streams")
FOLDERS = ("ops", "layers", "adapters", "models", "distributed")


def part_of(module: str) -> str:
    """The node of a module in the drawing."""
    first, *rest = module.split(".")
    if first != "lightning_modules" or not rest:
        return first
    if rest[0] in (*FOLDERS, "generation"):
        return rest[0]
    return "fast_state" if rest[0] in FAST_STATE else "variants"


def test_imports_are_those_that_are_drawn() -> None:
    text = (ROOT / "docs" / "structure.md").read_text()
    drawn = set(re.findall(r"^ *(\w+) --> (\w+)$", text, re.MULTILINE))
    parts: dict[str, set[str]] = {}
    for module, names in imports_between_modules().items():
        parts.setdefault(part_of(module), set()).update(map(part_of, names))
    arrows = {a: ends - {a, "lightning_modules"} for a, ends in parts.items()}
    assert drawn == {(a, b) for a, ends in arrows.items() for b in ends}
    TopologicalSorter(arrows).prepare()


# --- versions and configs ---


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def requirements() -> list[Requirement]:
    setup = read_setup()
    texts = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    return [Requirement(line) for text in texts for line in text.splitlines() if line]


def test_constraints_pin_every_requirement_within_its_range() -> None:
    # torch's CUDA builds each need one version of triton, so a pin would rule them out.
    wanted = [r for r in requirements() if r.name != "triton"]
    assert len(wanted) > 20
    missing = [r.name for r in wanted if canonicalize_name(r.name) not in pins()]
    assert not missing
    wrong = [str(r) for r in wanted if not r.specifier.contains(pins()[canonicalize_name(r.name)])]
    assert not wrong


def test_triton_is_not_pinned() -> None:
    assert "triton" not in pins()


def test_every_import_of_the_sources_is_declared() -> None:
    declared = {canonicalize_name(r.name).replace("-", "_") for r in requirements()}
    known = {*STDLIB, *PACKAGES, *declared, "PIL"}  # PIL: the import name of pillow
    roots = {name.split(".")[0] for path in SOURCES for name in imported(path)}
    assert roots - known == set()


def test_every_config_is_run_by_a_test() -> None:
    texts = [path.read_text() for path in TESTS if path != Path(__file__)]
    collects = re.compile(r"configs.*glob\(.*yaml", re.IGNORECASE)
    assert any(collects.search(text) for text in texts), "no test globs over configs/**/*.yaml"
