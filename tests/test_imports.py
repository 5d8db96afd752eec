"""Every import of our own modules leads somewhere, also those inside functions, which nothing runs until late."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted(ROOT.glob("fastreid_uns/**/*.py"))
PROJECTS = sorted(ROOT.glob("projects/**/*.py"))
TOOLS = sorted(ROOT.glob("tools/**/*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(text: str, package: str) -> Iterator[tuple[int, str, str]]:
    """Line, module and name of each import at any depth; the name is empty for a module as a whole."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) + 1 - node.level]
                module = ".".join([*above, *([module] if module else [])])
            yield from ((node.lineno, module, alias.name) for alias in node.names)


def fault_of(module: str, name: str) -> str:
    """Why an import fails; empty if it does not, or only lacks a package of others."""
    try:
        found = importlib.import_module(module)
        if name in ("", "*") or hasattr(found, name):
            return ""
        importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError as error:
        ours = (error.name or "").split(".")[0] == module.split(".")[0]
        return str(error) if ours else ""
    return ""


def package_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts[:-1]
    return ".".join(("fastreid_uns", *parts) if parts[:1] == ("projects",) else parts)


def test_the_reader_of_imports_sees_each_form():
    text = "import a.b, c\nfrom ..d import e\nfrom . import f\ndef later():\n    from g import h as i\n"
    found = [("a.b", ""), ("c", ""), ("x.d", "e"), ("x.y", "f"), ("g", "h")]
    assert [(module, name) for _, module, name in imports(text, "x.y")] == found


def test_a_broken_import_is_told():
    assert fault_of("fastreid_uns.errors", "UserError") == ""
    assert fault_of("fastreid_uns", "errors") == ""
    assert fault_of("fastreid_uns.moved", "") == "No module named 'fastreid_uns.moved'"
    assert "fastreid_uns.errors.Gone" in fault_of("fastreid_uns.errors", "Gone")


@pytest.mark.parametrize("path", [*PACKAGE, *PROJECTS, *TOOLS], ids=name_of)
def test_imports_of_our_own_modules_lead_somewhere(path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path] if path in TOOLS else sys.path)
    siblings = {other.stem for other in path.parent.glob("*.py")} if path in TOOLS else set()
    faults = [
        f"line {line}: {fault}"
        for line, module, name in imports(path.read_text(encoding="utf-8"), package_of(path))
        if module.split(".")[0] in {"fastreid_uns", *siblings} and (fault := fault_of(module, name))
    ]
    assert not faults
