"""What CONTRIBUTING.md promises about the tree, checked."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from edgepress.calibration.base import calibrator_class, calibrator_names
from edgepress.passes.base import Context, pass_class, pass_names
from edgepress.targets.load import parse_target, target_names, validate
from tests.graphs import net

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "calibration": {"calibration"},
    "targets": {"targets"},
    "passes": {"passes", "calibration"},
    "pipeline": {"pipeline", "passes", "targets", "calibration"},
}
LONGEST_FILE_LINES = 500


def files(*folders: str, suffix: str = ".py") -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob(f"*{suffix}"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every module that a file imports, with its line; `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package: str) -> None:
    wrong = []
    for path in files(package):
        for line, module in imports(path):
            parts = module.split(".")
            if parts[0] == "edgepress" and parts[1] not in MAY_IMPORT[package]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert wrong == []


def test_no_package_reaches_into_anothers_private_modules() -> None:
    wrong = []
    for package in MAY_IMPORT:
        for path in files(package):
            for line, module in imports(path):
                parts = module.split(".")
                private = any(re.match(r"_[a-z]", part) for part in parts[2:])
                if parts[0] == "edgepress" and parts[1] != package and private:
                    wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert wrong == []


def test_our_packages_are_imported_by_their_installed_names() -> None:
    wrong = []
    for path in files(*MAY_IMPORT, "tests", "docs"):
        for line, module in imports(path):
            if module.startswith(".") or module.split(".")[0] in MAY_IMPORT:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert wrong == []


def test_every_module_says_what_it_is() -> None:
    sources = files(*MAY_IMPORT, "benchmarks", "examples", "docs")
    assert [
        str(path.relative_to(ROOT))
        for path in sources
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ] == []


def test_no_file_is_too_long() -> None:
    folders = (*MAY_IMPORT, "tests", "benchmarks", "examples", "docs")
    sources = [path for suffix in (".py", ".c", ".h") for path in files(*folders, suffix=suffix)]
    lengths = {path: path.read_text(encoding="utf-8").count("\n") for path in sources}
    assert {str(p.relative_to(ROOT)): n for p, n in lengths.items() if n > LONGEST_FILE_LINES} == {}


@pytest.mark.parametrize("name", pass_names())
def test_every_pass_is_one_class_with_its_own_test(name: str) -> None:
    stem = name.replace("-", "_")
    test = ROOT / "tests/passes" / f"test_{stem}.py"
    assert test.is_file()
    assert pass_class(name).__name__ in test.read_text(encoding="utf-8")
    assert pass_class(name).__name__ == "".join(word.capitalize() for word in name.split("-"))


@pytest.mark.parametrize("name", calibrator_names())
def test_every_calibrator_has_a_test_that_names_it(name: str) -> None:
    words = re.compile(rf"\b({name}|{calibrator_class(name).__name__})\b")
    assert any(words.search(p.read_text(encoding="utf-8")) for p in files("tests/calibration"))


@pytest.mark.parametrize("name", target_names())
def test_every_board_has_a_test_that_names_it(name: str) -> None:
    assert any(f'"{name}"' in p.read_text(encoding="utf-8") for p in files("tests"))


@pytest.mark.parametrize("page", ["passes.md", "targets.md", "cli.md"])
def test_the_reference_pages_are_up_to_date(page: str) -> None:
    written = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert written == generator().PAGES[page](), "stale: run `make docs`"


DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_the_guide_to_boards_shows_one_that_works() -> None:
    validate(parse_target("guide", example("adding_a_board.md", "toml")))


def test_the_guide_to_passes_shows_one_that_works() -> None:
    names: dict[str, Any] = {"__name__": "clamp_weights"}
    module = ModuleType("clamp_weights")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(example("writing_a_pass.md", "python"), names)
    finally:
        del sys.modules[module.__name__]
    model = net(
        "(float[1,2] x) => (float[1,2] y)", "y = Add(x, w)", {"w": np.array([9, -9], np.float32)}
    )
    outcome = names["ClampWeights"](limit=2.0).call(model, Context())
    clamped = outcome.model.graph.initializers["w"].const_value
    assert clamped is not None
    np.testing.assert_array_equal(clamped.numpy(), np.array([2, -2], np.float32))
    assert outcome.stats == {"clamped": 1}


def example(page: str, language: str) -> str:
    """The first code block of a page."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return text.partition(f"```{language}\n")[2].partition("```")[0]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
