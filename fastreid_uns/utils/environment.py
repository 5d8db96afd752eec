"""What a run ran on, for the log."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from fastreid_uns import __version__
from fastreid_uns.utils import comm

LIBRARIES = ("torch", "torchvision", "timm", "numpy", "scipy", "scikit-learn", "numba", "pillow")


def environment(device: torch.device) -> dict[str, str]:
    """Versions, commit and hardware, by name."""
    found = {
        "fastreid_uns": __version__,
        "commit": commit(Path(__file__).resolve().parents[2]),
        "python": platform.python_version(),
    }
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = "not installed"
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    found["cores"] = str(cores())
    found["processes"] = str(comm.world())
    return found


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Name of the CPU."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit(root: Path) -> str:
    """Short hash of the commit in `root`, with `-dirty` if code or configs differ from it; `unknown` without git."""
    git = ["git", "-C", str(root)]
    try:
        found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10)
        code = subprocess.run(
            [*git, "diff", "--quiet", "HEAD", "--", "*.py", "*.yaml"], capture_output=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    name = found.stdout.strip()
    return f"{name}{'-dirty' if code.returncode else ''}" if name else "unknown"
