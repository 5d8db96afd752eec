"""What a user waits for before anything happens."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IMPORT = ["-c", "import fastreid_uns"]
HELP = [str(ROOT / "tools/train_net.py"), "--help"]


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - start


@pytest.mark.parametrize(("arguments", "limit"), [(IMPORT, 0.2), (HELP, 1.5)], ids=["import", "help"])
def test_best_of_five_starts_is_quick(arguments, limit):
    assert min(seconds(arguments) for _ in range(5)) < limit


@pytest.mark.parametrize("arguments", [IMPORT, HELP], ids=["import", "help"])
def test_nothing_heavy_is_imported(arguments):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    )
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "fastreid_uns" in modules or "argparse" in modules
    assert not modules & {"torch", "numpy", "numba", "yaml", "PIL", "scipy"}
