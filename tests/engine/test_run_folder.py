"""One run at a time, no run over another, and no planted link followed."""

import contextlib
import logging
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastreid_uns.engine.log import setup_logging
from fastreid_uns.engine.run_folder import LOCK, RunFolder

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, time
from fastreid_uns.engine.run_folder import RunFolder
run = RunFolder(sys.argv[1])
run.claim()
print("claimed", flush=True)
sys.stdin.read()
"""


def holder(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "claimed\n"
    return process


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_a_second_process_is_refused_until_the_first_ends_however_it_ends(tmp_path, end):
    with holder(tmp_path / "run") as first:
        with pytest.raises(
            RuntimeError, match=rf"run is in use by process {first.pid} on .* since 20.*Wait for its end"
        ):
            RunFolder(tmp_path / "run").claim()
        first.stdin.close() if end == "exit" else first.send_signal(signal.SIGKILL)
        first.wait()
    assert (tmp_path / "run" / LOCK).exists() == (end == "kill")
    run = RunFolder(tmp_path / "run")
    run.claim()
    run.accept({})
    assert f"process {os.getpid()} " in (tmp_path / "run" / LOCK).read_text()
    run.release()
    assert not (tmp_path / "run" / LOCK).exists()


def test_trainers_of_one_process_share_the_folder(tmp_path):
    one, two = RunFolder(tmp_path), RunFolder(tmp_path)
    one.claim()
    two.claim()
    one.release()
    assert (tmp_path / LOCK).exists()
    two.release()
    assert not (tmp_path / LOCK).exists()


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    run = RunFolder(tmp_path)
    run.claim()
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.write(ready[1], b"x")
        os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    run.release()
    with holder(tmp_path) as other:
        other.stdin.close()
    os.write(done[1], b"x")
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_in_the_place_of_the_folder(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"OUTPUT_DIR: .*file.* is a file or is below one"):
        RunFolder(tmp_path / place).claim()


def test_a_folder_that_cannot_be_made():
    with pytest.raises(RuntimeError, match=r"OUTPUT_DIR: /proc/none cannot be written \(.*choose another OUTPUT_DIR"):
        RunFolder("/proc/none").claim()


def test_planted_links_are_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    run = RunFolder(tmp_path / "run")
    run.make()
    for name in ("config.yaml", "log.txt"):
        (run.path / name).symlink_to(victim)
    run.accept({"config.yaml": "SEED: 1\n"})
    with pytest.raises(RuntimeError, match=r"log\.txt cannot be written: a symbolic link, .* Move it away"):
        setup_logging(run.path)
    assert victim.read_text() == "precious"
    assert (run.path / "config.yaml").read_text() == "SEED: 1\n"
    run.release()
    (run.path / LOCK).symlink_to(victim)
    with pytest.raises(RuntimeError, match=r"\.lock cannot be written: a symbolic link"):
        run.claim()
    assert victim.read_text() == "precious"
    (run.path / LOCK).unlink()
    (run.path / LOCK).mkdir()
    with pytest.raises(RuntimeError, match=r"\.lock cannot be written: a folder is in its place, a file is needed"):
        run.claim()


@contextlib.contextmanager
def small_disk():
    """Within the block no file may grow beyond 100 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_file(tmp_path):
    run = RunFolder(tmp_path)
    run.accept({"config.yaml": "old\n"})
    with small_disk(), pytest.raises(RuntimeError, match=r"config\.yaml cannot be written"):
        run.accept({"config.yaml": "new " * 100})
    assert (tmp_path / "config.yaml").read_text() == "old\n"
    assert {file.name for file in tmp_path.iterdir()} == {LOCK, "config.yaml"}


def test_a_full_disk_costs_lines_of_the_log_and_one_warning(tmp_path, capsys):
    setup_logging(tmp_path)
    with small_disk():
        for _ in range(3):
            logging.getLogger("fastreid_uns").info("a line " * 20)
    assert capsys.readouterr().err.count("lines are lost") == 1
    setup_logging(None)


def test_what_is_a_run(tmp_path):
    run = RunFolder(tmp_path)
    (tmp_path / "log.txt").write_text("began\n")
    (tmp_path / "metrics.jsonl").write_text("")
    assert not run.holds_run()
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 0}\n')
    with pytest.raises(ValueError, match=r"holds a run already \(metrics\.jsonl, without a checkpoint\)"):
        run.refuse_a_run()
