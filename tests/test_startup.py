"""What a user waits for before anything happens."""

import importlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastreid_uns.commands import COMMANDS

ROOT = Path(__file__).parents[1]
IMPORT = ["-c", "import fastreid_uns"]
PACKAGES = ["-c", "import fastreid_uns.engine, fastreid_uns.data, fastreid_uns.modeling, fastreid_uns.evaluation"]
HEAVY = {"torch", "numpy", "numba", "yaml", "PIL", "scipy", "iopath", "fvcore", "logging", "multiprocessing"}
HELP = [str(ROOT / "tools/train_net.py"), "--help"]


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - start


@pytest.mark.parametrize(("arguments", "limit"), [(IMPORT, 0.2), (HELP, 1.5)], ids=["import", "help"])
def test_best_of_five_starts_is_quick(arguments, limit):
    assert min(seconds(arguments) for _ in range(5)) < limit


@pytest.mark.parametrize("arguments", [IMPORT, PACKAGES, HELP], ids=["import", "packages", "help"])
def test_nothing_heavy_is_imported(arguments):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    )
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "fastreid_uns" in modules or "argparse" in modules
    assert not modules & HEAVY


def test_help_of_every_command_imports_little():
    """In one process, one after the other."""
    code = (
        "import contextlib, sys\n"
        "from fastreid_uns.commands import COMMANDS, main\n"
        "for command in COMMANDS:\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        main([command, '--help'])\n"
        "print(*sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.count("usage: ") == len(COMMANDS)
    assert not set(done.stderr.split()) & HEAVY


@pytest.mark.parametrize("package", ["", ".engine", ".data", ".modeling", ".evaluation"])
def test_public_names_exist_and_are_imported_when_they_are_used(package):
    module = importlib.import_module(f"fastreid_uns{package}")
    assert "DefaultTrainer" in dir(module) or package not in ("", ".engine")
    for name in dir(module):
        assert getattr(module, name) is not None or name.startswith("__")
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        module.nonsense  # noqa: B018


def test_launch_is_the_function_whatever_was_imported_before():
    from fastreid_uns.engine import launch
    from fastreid_uns.engine.launch import launch as function

    assert launch is function
