"""What the pages name is there: links, headings, files, configs, modules and what they export."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "benchmarks").glob("*.md"))
OURS = "lightning_modules|datamodules|callbacks|benchmarks"
LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)|<img src=\"([^\"]+)\"")
FILE = re.compile(r"(?<![\w/.])((?:\w+/)+(?:\w+\.(?:py|yaml|md))?)(?![\w/*.])")
IMPORT = re.compile(rf"^ *from ((?:{OURS})[\w.]*) import (?:\(([^)]+)\)|(.+))$", re.MULTILINE)
MODULE = re.compile(rf"(?:-m|^import) ((?:{OURS})\.[\w.]*\w)", re.MULTILINE)
CONFIGS = re.compile(r"^\| variant \|.*\| configs \|\n\|[-|]+\n((?:\|.*\n)+)", re.MULTILINE)
FOLDERS = ("", "lightning_modules", "benchmarks")  # a page may leave the first folder out


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links without a target, or whose target has no such heading."""
    broken = []
    for markdown, picture in LINK.findall(text):
        link = markdown or picture
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (heading and heading not in headings(target.read_text())):
            broken.append(link)
    return broken


def headings(text: str) -> set[str]:
    """Names by which headings are linked: lower case, hyphens for spaces, no other signs."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


def lost_files(text: str) -> list[str]:
    """Python files, configs and pages in a folder of the repository that are not there.

    Folders that are not the repository's are a reader's (`my_run/x.yaml`) or another project's.
    """
    lost = []
    for name in sorted({name for name in FILE.findall(text) if "." in name}):
        first = name.split("/")[0]
        inside = [ROOT / f for f in FOLDERS if (ROOT / f / first).is_dir()]
        if inside and not any((folder / name).exists() for folder in inside):
            lost.append(name)
    return lost


def lost_configs(text: str) -> list[str]:
    """Names in the last column of the table of variants that are no config, nor their folder."""
    rows = [row for table in CONFIGS.findall(text) for row in table.splitlines()]
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[-2])]
    found = [name for name in names if not name.startswith("_")]  # `_control`: an ending
    paths = {name: ROOT / "configs" / name for name in found}
    return [n for n, p in paths.items() if not (p.is_dir() or Path(f"{p}.yaml").exists())]


def lost_names(text: str) -> list[str]:
    """Modules that cannot be imported, and names that they do not have."""
    lost = []
    for module, several, one in IMPORT.findall(text):
        names = re.findall(r"\w+", re.sub(r"#.*| as \w+", "", several or one))
        lost += [f"{module}.{n}" for n in names if not hasattr(load(module), n)]
    return lost + [module for module in MODULE.findall(text) if load(module) is None]


def load(module: str) -> object | None:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    assert not broken_links(page, text)
    assert not lost_files(text)
    assert not lost_configs(text)
    assert not lost_names(text)


def test_the_pages_name_things() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    assert len(LINK.findall(text)) > 60
    assert len({name for name in FILE.findall(text) if "." in name}) > 30
    assert len(IMPORT.findall(text)) > 20
    assert CONFIGS.findall(text)


def test_what_is_not_there_is_noticed() -> None:
    page = ROOT / "README.md"
    assert broken_links(page, "[a](docs/cli.md) [b](docs/clo.md) [c](#limits) [d](#limit)") == [
        "docs/clo.md",
        "#limit",
    ]
    assert lost_files("`ops/ttt_naive.py`, configs/quickstart.yaml, configs/quickstrat.yaml") == [
        "configs/quickstrat.yaml"
    ]
    table = "| variant | LightningModule | configs |\n|---|---|---|\n| a | `A` | `{}` |\n"
    assert lost_configs(table.format("pi0_ttt_tiny")) == []
    assert lost_configs(table.format("pi0_ttt_tin")) == ["pi0_ttt_tin"]
    assert lost_names("from callbacks import EMA, EMB\npython -m callbacks.diagnos") == [
        "callbacks.EMB",
        "callbacks.diagnos",
    ]
