"""All runs of the comparison in one call, for a GPU that is there for minutes only: unpack, run, write what is there.

The folder of archives holds the real sets as .tar, .tar.gz or .tar.xz, and perhaps `runs.jsonl` of an earlier call that
is continued. A GPU is used if there is one, by many processes at a time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main() -> int:
    """The exit code of `compare`."""
    from fastreid_uns.utils.places import path_of

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archives", type=path_of, help="folder of the archives")
    parser.add_argument(
        "--output", type=path_of, default=Path("output/evidence"), help="folder of runs.jsonl and tables"
    )
    parser.add_argument("--work", type=path_of, default=Path("output/compare"), help="folder of logs and pixels")
    parser.add_argument("--minutes", type=float, default=8.0, help="from now on; no run starts after them")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) - 2), help="runs at a time")
    parser.add_argument("--studies", nargs="*", default=[], help="of projects/studies.yaml; none = all")
    parser.add_argument("--study-file", default="projects/studies.yaml")
    options = parser.parse_args()
    os.chdir(ROOT)
    end = time.monotonic() + 60 * options.minutes
    with ThreadPoolExecutor() as pool:
        list(pool.map(unpack, sorted(options.archives.glob("*.tar*"))))
    options.output.mkdir(parents=True, exist_ok=True)
    if (options.archives / "runs.jsonl").is_file():
        shutil.copy(options.archives / "runs.jsonl", options.output)
    os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = "1"
    from fastreid_uns.commands.compare import main as compare

    words = ["--studies", *options.studies, "--study-file", options.study_file, "--jobs", options.jobs]
    words += ["--minutes", (end - time.monotonic()) / 60, "--output", options.work]
    words += ["--results", options.output / "runs.jsonl", "--tables", options.output]
    return compare([str(word) for word in words])


def unpack(archive: Path) -> None:
    """Unpack a set into datasets/, unless it is there."""
    if not (ROOT / "datasets" / archive.name.partition(".")[0]).exists():
        with tarfile.open(archive) as content:
            content.extractall(ROOT / "datasets", filter="data")


if __name__ == "__main__":
    sys.exit(main())
