"""The command line's parser: a wrong key, type or class name ends in one line that names it.

jsonargparse parses every nested class with a parser of its own and wraps the inner error in the
outer one, once per member of a union. Here each parser hands up a `Finding` instead, which the
outer parsers extend by their own key; the outermost one prints it.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import difflib
import inspect
import json
import pydoc
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, NoReturn, Union, get_args, get_origin

from jsonargparse import ActionConfigFile, Namespace
from lightning.pytorch.cli import LightningArgumentParser

ROOT = Path(__file__).resolve().parents[1]
_CLASS_KEYS = ("class_path", "init_args")
_PRINT_FLAGS = ("comments", "skip_default", "skip_unset")
_HANDED_UP = re.compile(
    r"(?:class_path '(?P<before>[^']+)':\s*)?<<(?P<code>[\w=-]+)>>"
    r"(?:\. Got value: Namespace\(class_path='(?P<after>[^']+)')?"
)
_UNKNOWN_KEY = re.compile(
    r"(?:Group '(?P<group>[^']+)' does not accept o|(?:Subcommand .* )?[Oo])ption '(?P<key>[^']+)'"
    r"|unrecognized arguments: -*(?P<argument>[^\s=]+)"
)
_WRONG_CLASS = (
    re.compile(r"Problem with given class_path '(?P<name>[^']+)':\s*(?P<why>[^\n]+)"),
    re.compile(r"class: (?P<why>.*?)\. Got value: Namespace\(class_path='(?P<name>[^']+)'"),
    re.compile(r"Import path (?P<name>\S+) (?P<why>does not correspond to a subclass of \w+)"),
    re.compile(r"Expected a dot import path string: (?P<name>\S+)(?P<why>)"),
)


class Finding(NamedTuple):
    """What is wrong at which key of which class, and the way out."""

    what: str
    key: str = ""
    owner: str = ""
    way_out: str = ""

    def __str__(self) -> str:
        key = f" '{self.key}'" if self.key else ""
        owner = f" of {self.owner}" if self.owner else ""
        return f"{self.what}{key}{owner}{self.way_out}"

    def encode(self) -> str:
        """One word, which survives the line breaks and replacements of the outer messages."""
        return f"<<{base64.urlsafe_b64encode(json.dumps(self).encode()).decode()}>>"

    @classmethod
    def decode(cls, code: str) -> Finding:
        """Inverse of `encode`, without the brackets."""
        return cls(*json.loads(base64.urlsafe_b64decode(code)))


class ConfigFile(ActionConfigFile):
    """`--config`: a file that is not found from here is looked up beside `cli.py`."""

    def __call__(
        self, parser: Any, cfg: Any, values: Any, option_string: str | None = None
    ) -> None:
        path = next((p for p in (Path(values), ROOT / values) if p.is_file()), None)
        if path is None:
            configs = [str(p.relative_to(ROOT)) for p in ROOT.glob("configs/**/*.yaml")]
            parser.error(f"config file '{values}' not found{_suggest(values, configs)}")
        parser.reading = path
        super().__call__(parser, cfg, str(path), option_string)
        parser.reading = None


class ConfigParser(LightningArgumentParser):
    """Argument parser with short errors and without abbreviated options."""

    reading: Path | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """As in argparse; a config file option becomes a `ConfigFile`."""
        if kwargs.get("action") is ActionConfigFile:
            kwargs["action"] = ConfigFile
        return super().add_argument(*args, **kwargs)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *more: Any, **kwargs: Any
    ) -> Namespace:
        """As in jsonargparse; a null stays null where an outer parser hands it down as text."""
        if args is not None and not self.exit_on_error:
            args = [re.sub(r"=None$", "=null", arg) for arg in args]
        return super().parse_args(args, *more, **kwargs)

    def validate(self, namespace: Namespace, *args: Any, **kwargs: Any) -> None:
        """As in jsonargparse, and a null or a scalar must not stand where the type forbids it."""
        super().validate(namespace, *args, **kwargs)
        for action in self._actions:
            if action.dest not in namespace:
                continue
            value = namespace[action.dest]
            optional = action.default is None or type(None) in _leaves(_hint(action))
            is_null = hasattr(action, "_typehint") and value is None and not optional
            is_scalar = _children(self, action.dest) and not isinstance(value, (Namespace, dict))
            if is_null or is_scalar:
                given = "null" if value is None else value
                raise TypeError(f'Parser key "{action.dest}": Got value: {given}')

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and exit with code 2, or hand a finding up to the outer parser."""
        finding = diagnose(self, message)
        if not self.exit_on_error:
            raise argparse.ArgumentError(None, finding.encode()) from ex
        parser = getattr(ex, "subcommand_parser", None) or self
        source = f" (in {self.reading})" if self.reading else ""
        sys.stderr.write(f"all options: {parser.prog.replace(' [options]', '')} --help\n")
        sys.stderr.write(f"error: {finding}{source}\n")
        sys.exit(2)


def diagnose(parser: argparse.ArgumentParser, message: str) -> Finding:
    """The innermost cause in a parser's error message."""
    named = re.match(r'Parser key "([^"]+)"', message)
    key = named[1] if named else ""
    inner = [_extend(key, match) for match in _HANDED_UP.finditer(message)]
    if inner:
        return max(inner, key=lambda finding: finding.key.count("."))
    if unknown := _UNKNOWN_KEY.match(message):
        if (word := unknown["argument"]) and f"-{word}" not in message:
            return Finding(f"'{word}' is no option", way_out="; config files go behind --config")
        group = f"{unknown['group']}." if unknown["group"] else ""
        return _unknown_key(parser, group + (unknown["key"] or unknown["argument"]))
    if missing := re.match(r"the following arguments are required: ([^\s,]+)", message):
        key = re.sub("^(fit|validate|test|predict)[.]", "", missing[1])
        example = ", e.g. --config configs/quickstart.yaml" if key in ("model", "data") else ""
        way_out = f": give it in a --config file{example} or as an option"
        return Finding("missing key", key, way_out=way_out)
    if flag := re.match(r'Invalid option "(\w+)" for --print_config', message):
        return Finding(
            f"unknown flag '{flag[1]}' of --print_config", way_out=_suggest(flag[1], _PRINT_FLAGS)
        )
    if asked := re.match(r"--(\S+)\.help: Expected a dot import path string: (\S+)$", message):
        names = {c.__name__ for base in _classes(parser, asked[1]) for c in _subclasses(base)}
        return Finding(
            f"unknown class '{asked[2]}' for --{asked[1]}.help", way_out=_suggest(asked[2], names)
        )
    hint = next((_hint(action) for action in _arguments(parser) if action.dest == key), None)
    return (
        _wrong_class(key, hint, message)
        or _wrong_value(parser, key, hint, message)
        or Finding(_one_line(message))
    )


def _extend(key: str, match: re.Match[str]) -> Finding:
    """A finding inside a nested class, as seen by the class around it."""
    finding = Finding.decode(match["code"])
    class_path = match["before"] or match["after"] or ""
    keys = [key, finding.key]
    in_init_args = not difflib.get_close_matches(finding.key.split(".")[0], _CLASS_KEYS)
    if class_path and in_init_args and not dataclasses.is_dataclass(pydoc.locate(class_path)):
        keys.insert(1, "init_args")
    owner = finding.owner or class_path.rpartition(".")[2]
    return finding._replace(key=".".join(filter(None, keys)), owner=owner)


def _unknown_key(parser: argparse.ArgumentParser, key: str) -> Finding:
    """Names the first component of a dotted key that does not exist beside its siblings."""
    parts = key.split(".")
    siblings: set[str] = set()
    depth = 0
    for depth, part in enumerate(parts):
        siblings = _children(parser, ".".join(parts[:depth]))
        if part not in siblings:
            break
    if depth == 0 and not getattr(parser, "exit_on_error", True):
        siblings.update(_CLASS_KEYS)
    deeper = _deeper(parser, ".".join(parts[:depth]), parts[depth])
    near = difflib.get_close_matches(parts[depth], siblings, cutoff=0.6)
    if deeper and not near:
        way_out = "; did you mean " + " or ".join(f"'{name}'" for name in deeper) + "?"
    else:
        way_out = _suggest(parts[depth], siblings)
    return Finding("unknown key", ".".join(parts[: depth + 1]), way_out=way_out)


def _deeper(parser: argparse.ArgumentParser, key: str, name: str) -> list[str]:
    """Keys further below `key` whose last component is the closest to `name`, at most three."""
    prefix = f"{key}." if key else ""
    below: set[str] = set()
    for action in _arguments(parser):
        if action.dest.startswith(prefix):
            options = [t for t in _leaves(_hint(action)) if dataclasses.is_dataclass(t)]
            fields = [field.name for t in options for field in dataclasses.fields(t)]
            below |= {action.dest, *(f"{action.dest}.{field}" for field in fields)}
    found = sorted(dest[len(prefix) :] for dest in below if "." in dest[len(prefix) :])
    last = {dest.rpartition(".")[2] for dest in found}
    close = difflib.get_close_matches(name, sorted(last), n=1, cutoff=0.65)
    return [dest for dest in found if dest.rpartition(".")[2] in close][:3]


def _wrong_class(key: str, hint: Any, message: str) -> Finding | None:
    scalars = {str, int, float, bool, type(None)}
    classes = [t for t in _leaves(hint) if inspect.isclass(t)]
    names = {c.__name__ for base in set(classes) - scalars for c in _subclasses(base)}
    for pattern in _WRONG_CLASS:
        if not (found := pattern.search(message)) or not names:
            continue
        name, why = found["name"], found["why"]
        if why or name[:1].isupper() or not {str, int, float, bool} & set(classes):
            why = f" ({why})" if why else ""
            if pydoc.locate(name) is not None:
                return Finding(f"class '{name}' does not fit", key, way_out=why)
            way_out = f"{why}{_suggest(name.rpartition('.')[2], names)}"
            return Finding(f"unknown class '{name}' for", key, way_out=way_out)
    dotted = re.search(r"Got value: (?P<path>[\w.]+\.(?P<name>[A-Z]\w*))$", message)
    if dotted and get_origin(hint) is Callable:
        return Finding(
            f"unknown class '{dotted['path']}' for", key, "", _suggest(dotted["name"], names)
        )
    if "Not a valid subclass" in message:
        for word in re.findall(r"'(\w+)':", message):
            if word not in _CLASS_KEYS and difflib.get_close_matches(word, _CLASS_KEYS):
                way_out = _suggest(word, _CLASS_KEYS)
                return Finding("unknown key", f"{key}.{word}", way_out=way_out)
    return None


def _wrong_value(
    parser: argparse.ArgumentParser, key: str, hint: Any, message: str
) -> Finding | None:
    values = re.findall(r"(?:Got|Given) value: (.*)", message)
    keys = sorted(_children(parser, key)) if key else []
    if not values or not (hint or keys):
        return None
    if nested := re.match(r"NestedArg\(key='([^']*)', val='?(.*?)'?\)$", values[-1]):
        key, values = f"{key}.{nested[1]}", [nested[2]]
    choices = [str(c) for t in _leaves(hint) if get_origin(t) is Literal for c in get_args(t)]
    expected = f"a mapping with keys {_enumerate(keys)}" if keys else describe_type(hint)
    way_out = f": expected {expected}{_suggest(values[-1], choices, otherwise='')}"
    if get_origin(hint) in (tuple, list) and re.fullmatch(r"[\w.]+", values[-1]):
        way_out += f"; write it as a list: '[{values[-1]}]'"
    return Finding(f"wrong value {values[-1][:80]!r} for", key, way_out=way_out)


def _one_line(message: str) -> str:
    if message.startswith("Unexpected config"):
        return "expected a mapping of keys to values"
    return " ".join(message.replace('in "<unicode string>",', "at").split())


def _arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Actions of a parser; one that only has subcommands offers theirs."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                yield from _arguments(subparser)
        elif action.dest.rpartition(".")[2] != "help":
            yield action


def _children(parser: argparse.ArgumentParser, key: str) -> set[str]:
    """Names one level below a dotted key ("": top level)."""
    prefix = f"{key}." if key else ""
    dests = [action.dest for action in _arguments(parser)]
    return {dest[len(prefix) :].split(".")[0] for dest in dests if dest.startswith(prefix)}


def _hint(action: argparse.Action) -> Any:
    return getattr(action, "_typehint", None) or action.type


def _leaves(hint: Any) -> Iterator[Any]:
    """Types inside unions, containers and return types of callables."""
    if not get_args(hint) or get_origin(hint) is Literal:
        yield hint
        return
    for argument in get_args(hint):
        yield from _leaves(argument)


def _classes(parser: argparse.ArgumentParser, key: str) -> list[type]:
    """Classes that a key's type names."""
    hints = [_hint(action) for action in _arguments(parser) if action.dest == key]
    leaves = [leaf for hint in hints for leaf in _leaves(hint) if inspect.isclass(leaf)]
    return [leaf for leaf in leaves if leaf not in (str, int, float, bool, type(None))]


def _subclasses(base: type) -> Iterator[type]:
    """Concrete descendants; the class itself where it has none."""
    below: list[type] = type.__subclasses__(base)
    public = [c for c in below if not c.__name__.startswith("_")]
    if not public:
        yield base
    for subclass in public:
        yield subclass
        yield from _subclasses(subclass)


def describe_type(hint: Any) -> str:
    """A type as a reader of yaml would say it, e.g. `int | null`."""
    if get_origin(hint) is Literal:
        return " or ".join(repr(choice) for choice in get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return " | ".join(describe_type(member) for member in get_args(hint))
    if hint is type(None):
        return "null"
    name = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
    return re.sub(r"(?:\w+\.)+(\w+)", r"\1", name)


def _suggest(name: str, known: Iterable[str], otherwise: str = "; known: ") -> str:
    """`; did you mean 'x'?`, or what is known where nothing is close."""
    by_lower = {k.lower(): k for k in sorted(known)}
    if close := difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.4):
        return f"; did you mean '{by_lower[close[0]]}'?"
    return otherwise + _enumerate(list(by_lower.values())) if by_lower and otherwise else ""


def _enumerate(names: list[str], limit: int = 12) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
