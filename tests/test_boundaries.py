"""What the parts of the framework may know of each other, read from the syntax trees of all files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = sorted(path for path in ROOT.glob("fastreid_uns/**/*.py"))
PROJECTS = sorted(path for path in ROOT.glob("projects/*/**/*.py") if "tests" not in path.relative_to(ROOT).parts)
TOOLS = sorted(path for path in ROOT.glob("tools/*.py") if "__main__" in path.read_text())

LAYERS = (
    {"errors"},
    {"utils"},
    {"structures", "registry", "hook", "plugins"},
    {"data", "pseudo_labels", "modeling", "defaults", "bounds"},
    {"evaluation", "projects", "config"},
    {"published"},  # an encoder with its config
    {"engine", "predictor"},  # the predictor reads a config and extracts features
    {"photos", "hub", "experiments"},
    {"builtin"},
    {"commands"},
    {"__main__"},
)
LAYER = {unit: number for number, units in enumerate(LAYERS) for unit in units}

PAPER = re.compile(
    r"(?<![A-Za-z])(?:ACFL|ASCL|CAJ|CAP(?![A-Z])|ICE|ICL|ISE|MMT|NCPLR|O2CAP|PPLR|SpCL|TMP"
    r"|(?:acfl|ascl|ice|icl|ise|mmt|ncplr|pplr|spcl)(?![a-z]))"
)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")):
            yield node
            yield from runtime_nodes(node)


def imported_units(text: str, package: tuple[str, ...]) -> set[str]:
    """Parts of the core that a module of `package` imports: `data`, `engine`, ..."""
    modules: list[str] = []
    for node in runtime_nodes(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            origin = ".".join([*above, *([node.module] if node.module else [])])
            modules += [f"{origin}.{alias.name}" for alias in node.names]
    units = {f"{module}.".split(".")[1] for module in modules if module.split(".")[0] == "fastreid_uns"}
    return units & set(LAYER)  # the rest are attributes of the package, such as its version


def package_of(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(ROOT).parts[:-1]
    return ("fastreid_uns", *parts) if parts[0] == "projects" else parts


def unit_of(path: Path) -> str:
    return (*package_of(path), path.stem)[1]


def named(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of each identifier and of each string that is no documentation."""
    documentation = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "asname"):
            if isinstance(text := getattr(node, field, None), str):
                yield getattr(node, "lineno", 0), text
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.lineno, node.value


def test_import_reader_resolves_each_form():
    text = (
        "import torch, fastreid_uns.data.loader\nfrom fastreid_uns import plugins\nfrom ..engine import log\n"
        "from . import extract\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import fastreid_uns.config\n"
        "def later():\n    from fastreid_uns.modeling.heads import EmbeddingHead\n"
    )
    found = imported_units(text, ("fastreid_uns", "evaluation"))
    assert found == {"data", "plugins", "engine", "evaluation", "modeling"}


def test_every_part_of_the_core_has_a_layer():
    units = {unit_of(path) for path in CORE} - {"__init__"}
    assert units <= set(LAYER), f"give {units - set(LAYER)} a place in LAYERS"


@pytest.mark.parametrize("path", [*CORE, *PROJECTS], ids=name_of)
def test_imports_run_downwards(path):
    unit = unit_of(path)
    for other in imported_units(path.read_text(), package_of(path)) - {unit}:
        assert LAYER[other] < LAYER.get(unit, len(LAYERS)), f"{name_of(path)} ({unit}) must not import {other}"


def test_no_project_imports_another():
    for path in PROJECTS:
        own = path.relative_to(ROOT).parts[1]
        for node in runtime_nodes(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastreid_uns.projects"):
                inside = node.module.split(".")[2:3] or [alias.name for alias in node.names]
                assert set(inside) <= {own}, f"{name_of(path)} imports {inside}"


def test_names_of_papers_are_told_from_other_words():
    for text in ("ICELoss", "use_spcl", "SpCLLabels", "MODEL.ICL", "ice"):
        assert PAPER.search(text), text
    for text in ("device", "INDICES", "DEVICE", "slice", "tmp", "choices", "price_list"):
        assert not PAPER.search(text), text


@pytest.mark.parametrize("part", ["engine", "data", "evaluation"])
def test_no_paper_has_a_branch_in_the_core(part):
    for path in ROOT.glob(f"fastreid_uns/{part}/**/*.py"):
        for line, text in named(ast.parse(path.read_text())):
            assert not PAPER.search(text), f"{name_of(path)}:{line} names a paper: {text!r}"


def test_the_package_neither_prints_nor_asserts():
    for path in [*CORE, *PROJECTS]:
        if unit_of(path) == "commands":
            continue  # they talk to the terminal
        for node in ast.walk(ast.parse(path.read_text())):
            printing = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            assert not printing, f"{name_of(path)}:{node.lineno} prints; use the module's logger"
            assert not isinstance(node, ast.Assert), f"{name_of(path)}:{node.lineno} asserts; raise an error"


@pytest.mark.parametrize("path", TOOLS, ids=name_of)
def test_help_of_a_tool_needs_no_torch(path):
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{str(path)!r}, '--help']\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n    print('torch' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
    assert done.stderr.strip() == "False", "move the imports of torch and of what needs it into the functions"
