"""The package as a command."""

import subprocess
import sys

import fastreid_uns


def test_the_package_can_be_run():
    done = subprocess.run([sys.executable, "-m", "fastreid_uns", "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == fastreid_uns.__version__
    assert done.returncode == 0
