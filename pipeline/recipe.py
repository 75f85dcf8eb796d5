"""A recipe: which passes to run, with which options, and what the result must not exceed.

A recipe is a TOML file::

    schema = 1

    [[pass]]                 # in order
    name = "calibrate"
    method = "entropy"       # the fields of the pass are its options

    [budget]                 # every limit is a gate
    latency_ms = 20.0
    accuracy_drop = 0.5      # percentage points of top-1

    [preprocess]             # for folders of images: the fields of calibration.samples.Preprocess
    mean = [0.485, 0.456, 0.406]
    std = [0.229, 0.224, 0.225]

Errors::

    RecipeError              file:line, what is wrong, the nearest known key
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import re
import tomllib
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from edgepress.calibration.base import CalibrationError
from edgepress.calibration.samples import Preprocess
from edgepress.passes.base import Pass, PassError, UnknownPass, pass_class

SCHEMA = 1
_T = TypeVar("_T")
BUILT_IN = ("default", "none", "transformer", "float16")
INT16, FLOAT = "int16", "float"


class RecipeError(Exception):
    """A recipe that cannot be used: file:line, what is wrong, what to do."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the bundle must not exceed; None is no gate.

    Where the model that `quantize-int8` made misses `accuracy_drop` or `sqnr_db`, the layers that
    cost most accuracy are raised to a higher precision until both hold.

    Attributes:
        latency_ms: median latency on the device.
        size_bytes: executable and coded weights together.
        accuracy_drop: percentage points of top-1 lost against the original model; without labels,
            percentage points of disagreement with it.
        sqnr_db: the least SQNR of the outputs against the original model.
        raise_to: what layers may be raised to, of "int16" and "float"; empty for nothing.
    """

    latency_ms: float | None = None
    size_bytes: int | None = None
    accuracy_drop: float | None = None
    sqnr_db: float | None = None
    raise_to: tuple[str, ...] = (INT16, FLOAT)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A parsed recipe.

    Attributes:
        name: the built-in name or the file's stem.
        text: the file, verbatim.
        passes: the passes with their options, in order.
        budget: the gates.
        preprocess: how to turn images into samples, or None.
    """

    name: str
    text: str
    passes: tuple[Pass, ...] = ()
    budget: Budget = Budget()
    preprocess: Preprocess | None = None


def load_recipe(name: str) -> Recipe:
    """Read a built-in recipe, one of BUILT_IN, or a TOML file. Raises RecipeError."""
    if name in BUILT_IN:
        folder = importlib.resources.files("edgepress.pipeline") / "recipes"
        text = (folder / f"{name}.toml").read_text("utf-8")
        return parse_recipe(text, name, f"{name}.toml")
    path = Path(name)
    if path.suffix != ".toml":
        near = difflib.get_close_matches(name, BUILT_IN, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise RecipeError(
            f"no recipe is called {name!r}.{hint} Give default, none or a .toml file."
        )
    try:
        return parse_recipe(path.read_text("utf-8"), path.stem, str(path))
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}; give the path of a recipe.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not text in UTF-8; a recipe is a TOML file.") from error


def parse_recipe(text: str, name: str = "recipe", source: str = "recipe.toml") -> Recipe:
    """Parse the text of a recipe; `source` names the file in messages. Raises RecipeError."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        where = f"{source}:{line[1]}" if line else source
        raise RecipeError(f"{where}: this is not TOML: {error}.") from error
    reader = _Reader(source, _key_lines(text))
    reader.known(data, ("schema", "pass", "budget", "preprocess"), ())
    if type(data.get("schema")) is not int or data["schema"] != SCHEMA:
        newer = type(data.get("schema")) is int and data["schema"] > SCHEMA
        todo = "update edgepress" if newer else f"write `schema = {SCHEMA}`"
        raise reader.error(("schema",), f"schema is {data.get('schema')!r}, not {SCHEMA}; {todo}")
    tables = data.get("pass", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise reader.error(("pass",), "passes are written as [[pass]] tables")
    passes = tuple(_read_pass(table, index, reader) for index, table in enumerate(tables))
    budget = reader.build(Budget, data.get("budget", {}), ("budget",))
    for key, value in dataclasses.asdict(budget).items():
        if isinstance(value, int | float) and not value >= 0:
            raise reader.error(("budget", key), f"{key} is {value}; a budget is not negative")
    if unknown := [kind for kind in budget.raise_to if kind not in (INT16, FLOAT)]:
        what = f"raise_to holds {unknown[0]!r}; layers can be raised to 'int16' and 'float'"
        raise reader.error(("budget", "raise_to"), what)
    preprocess = None
    if "preprocess" in data:
        preprocess = reader.build(Preprocess, data["preprocess"], ("preprocess",))
    return Recipe(name=name, text=text, passes=passes, budget=budget, preprocess=preprocess)


def _read_pass(table: dict[str, Any], index: int, reader: _Reader) -> Pass:
    where = ("pass", index)
    if not isinstance(table.get("name"), str):
        raise reader.error(where, 'a [[pass]] needs a name, such as name = "calibrate"')
    try:
        cls = pass_class(table["name"])
    except UnknownPass as error:
        raise reader.error((*where, "name"), str(error).rstrip(".")) from error
    options = {key: value for key, value in table.items() if key != "name"}
    return reader.build(cls, options, where, ("name",))


class _Reader:
    """Checks tables of one file and says where they are wrong."""

    def __init__(self, source: str, lines: dict[tuple[str | int, ...], int]) -> None:
        self.source, self.lines = source, lines

    def error(self, where: tuple[str | int, ...], what: str) -> RecipeError:
        while where and where not in self.lines:
            where = where[:-1]
        end = "" if what.endswith("?") else "."
        return RecipeError(f"{self.source}:{self.lines.get(where, 1)}: {what}{end}")

    def known(
        self, table: dict[str, Any], names: Iterable[str], where: tuple[str | int, ...]
    ) -> None:
        names = list(names)
        for key in table:
            if key not in names:
                near = difflib.get_close_matches(key, names, 1, 0.4)
                known = ", ".join(names) or "none"
                hint = f"did you mean {near[0]!r}?" if near else f"known here: {known}"
                raise self.error((*where, key), f"unknown key {key!r}; {hint}".rstrip("."))

    def build(
        self,
        cls: type[_T],
        table: Any,
        where: tuple[str | int, ...],
        also_known: tuple[str, ...] = (),
    ) -> _T:
        """Make a dataclass of a table, every value checked against the field's type."""
        if not isinstance(table, dict):
            raise self.error(where, f"[{where[0]}] is a table")
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
        values = {key: value for key, value in table.items() if key not in also_known}
        self.known(values, [*also_known, *fields], where)
        hints = typing.get_type_hints(cls)
        for key, value in values.items():
            try:
                values[key] = _convert(value, hints[key])
            except TypeError as error:
                what = f"{key} is {value!r}, it must be {error}"
                raise self.error((*where, key), what) from None
        try:
            return cls(**values)
        except (TypeError, ValueError, PassError, CalibrationError) as error:
            raise self.error(where, str(error).rstrip(".")) from error


def _convert(value: Any, hint: Any) -> Any:
    """Return the value as the annotated type, or raise TypeError with what it must be."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise TypeError(" or ".join(repr(choice) for choice in arguments))
    if origin in (typing.Union, types.UnionType):
        wanted = []
        for option in arguments:
            try:
                return _convert(value, option)
            except TypeError as error:
                wanted.append(str(error))
        raise TypeError(" or ".join(name for name in wanted if name != "nothing"))
    if origin in (tuple, list):
        if isinstance(value, list):
            several = origin is list or arguments[-1:] == (Ellipsis,)
            kinds = [arguments[0]] * len(value) if several else list(arguments)
            if len(kinds) == len(value):
                return origin(_convert(v, kind) for v, kind in zip(value, kinds, strict=True))
        raise TypeError(f"a list of {_describe(arguments[0])}")
    if origin is dict:
        try:
            return {key: _convert(item, arguments[1]) for key, item in value.items()}
        except (AttributeError, TypeError):
            raise TypeError(f"a table in which each value is {_describe(arguments[1])}") from None
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is hint:
        return value
    raise TypeError(_describe(hint))


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    return "nothing" if hint is type(None) else names.get(hint, str(hint))


def _key_lines(text: str) -> dict[tuple[str | int, ...], int]:
    """Find the line of every table and key: `("pass", 0, "name")` to 4.

    A scan by lines, for messages only: keys inside multi-line values may be missed.
    """
    lines: dict[tuple[str | int, ...], int] = {}
    prefix: tuple[str | int, ...] = ()
    counts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if table := re.match(r"\s*\[\[\s*([\w.\"'-]+)\s*\]\]", line):
            name = table[1].strip("\"'")
            prefix = (name, counts.get(name, 0))
            counts[name] = counts.get(name, 0) + 1
            lines.setdefault((name,), number)
        elif table := re.match(r"\s*\[\s*([\w.\"'-]+)\s*\]", line):
            prefix = tuple(part.strip("\"'") for part in table[1].split("."))
            if counts.get(str(prefix[0])):
                prefix = (prefix[0], counts[str(prefix[0])] - 1, *prefix[1:])
        elif key := re.match(r"\s*([\w.-]+|\"[^\"]*\"|'[^']*')\s*=", line):
            lines.setdefault((*prefix, key[1].strip("\"'")), number)
            continue
        else:
            continue
        lines.setdefault(prefix, number)
    return lines
