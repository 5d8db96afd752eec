"""Arguments, exit codes, signals: what a shell sees of a command."""

import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from fastreid_uns.engine import default_argument_parser, launch, run_command
from fastreid_uns.engine.signals import Ending, ending_at_signals
from fastreid_uns.errors import FailedElsewhere, InvalidState, InvalidValue, UnknownName

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "line",
    [
        "--config-file a.yaml --resume SOLVER.EPOCHS 3 SEED 2",
        "SOLVER.EPOCHS 3 SEED 2 --config-file a.yaml --resume",
        "SOLVER.EPOCHS 3 --config-file a.yaml SEED 2 --resume",
    ],
)
def test_pairs_on_both_sides_of_a_flag(line):
    arguments = default_argument_parser().parse_args(line.split())
    assert arguments.opts == ["SOLVER.EPOCHS", "3", "SEED", "2"]
    assert (arguments.config_file, arguments.resume, arguments.eval_only, arguments.num_gpus) == (
        "a.yaml",
        True,
        False,
        1,
    )


@pytest.mark.parametrize("count", ["0", "-1", "two", "1.5", ""])
def test_numbers_of_processes_that_are_none(count, capsys):
    with pytest.raises(SystemExit) as error:
        default_argument_parser().parse_args(["--config-file", "a.yaml", f"--num-gpus={count}"])
    assert error.value.code == 2
    assert f"{count!r} is no number of processes; 1, 2, ... is accepted" in capsys.readouterr().err


def failing(error: BaseException):
    raise error


def test_a_command_gives_what_its_function_gives():
    assert run_command(lambda a, b: a + b, 2, 3) == 5
    assert launch(lambda a: a + 1, 1, args=(2,)) == 3


@pytest.mark.parametrize("error", [InvalidValue("a: b; c."), UnknownName("a: b; c."), InvalidState("a: b; c.")])
def test_what_a_user_can_mend_is_one_line(error, capsys):
    with pytest.raises(SystemExit) as exit:
        run_command(failing, error)
    assert exit.value.code == 2
    assert capsys.readouterr().err == "error: a: b; c.\n"


@pytest.mark.parametrize("error", [ValueError("mat1"), KeyError("hooks"), RuntimeError("shapes"), OSError("x")])
def test_a_fault_of_the_code_keeps_its_traceback(error, capsys):
    with pytest.raises(type(error)):
        run_command(failing, error)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 9.00 TiB for an array"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB"),
    ],
    ids=str,
)
def test_memory_that_is_not_enough_is_one_line(error, capsys):
    with pytest.raises(SystemExit) as exit:
        run_command(failing, error)
    assert exit.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: the memory is not enough ({str(error) or 'no memory'}). Lower the batch size")
    assert said.count("\n") == 1


def test_the_other_processes_say_nothing_of_an_error_that_is_not_theirs(capsys):
    with pytest.raises(SystemExit) as exit:
        run_command(failing, FailedElsewhere("process 0: a: b; c."))
    assert exit.value.code == 2
    assert capsys.readouterr().err == ""


def test_the_error_of_a_process_that_decodes_is_one_line(capsys):
    wrapped = (
        "Caught InvalidValue in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1, in f\nfastreid_uns.errors.InvalidValue: a.jpg: the file is empty; replace it.\n'
    )
    with pytest.raises(SystemExit):
        run_command(failing, InvalidValue(wrapped))
    assert capsys.readouterr().err == "error: a.jpg: the file is empty; replace it.\n"


def test_an_interrupt_raised_by_hand(capsys):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as exit:
        run_command(failing, KeyboardInterrupt())
    assert exit.value.code == 130
    assert capsys.readouterr().err.startswith("stopped: ")
    assert signal.getsignal(signal.SIGINT) is before


STUBBORN = """
import multiprocessing, sys, time
from pathlib import Path
from fastreid_uns.engine import run_command

def main(kind):
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
    child.start()
    print(child.pid, flush=True)
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            if kind == "polite":
                raise

run_command(main, sys.argv[1])
"""


SWALLOWED = """
import os, signal, sys
from fastreid_uns.engine import run_command

def main(what):
    try:
        os.kill(os.getpid(), int(what[0]))
        for _ in range(10**6):
            pass
    except KeyboardInterrupt:
        if what[1] == "error":
            raise RuntimeError("a worker has died") from None
    print("all done", flush=True)

run_command(main, sys.argv[1:])
"""


@pytest.mark.parametrize("kind", ["end", "error"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_ends_soon_after_a_library_has_swallowed_the_signal(kind, number, code):
    words = [sys.executable, "-c", SWALLOWED, str(int(number)), kind]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code
    assert done.stdout == ("all done\n" if kind == "end" else "")
    assert done.stderr == "stopped: nothing was begun; start the same command again.\n"


def test_an_interrupt_that_a_finalizer_swallows_is_not_shown(monkeypatch):
    """Python would write its traceback; the process ends a little later."""
    told: list[type] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda error: told.append(error.exc_type))
    interrupt, other = (types.SimpleNamespace(exc_type=kind) for kind in (KeyboardInterrupt, OSError))
    ending = Ending(lambda: None)
    with ending_at_signals(ending):
        for signalled in (None, signal.SIGINT):
            ending.signal = signalled
            sys.unraisablehook(interrupt)
            sys.unraisablehook(other)
        ending.signal = None
    assert told == [KeyboardInterrupt, OSError, OSError]
    sys.unraisablehook(interrupt)
    assert told[-1] is KeyboardInterrupt


@pytest.mark.parametrize("kind", ["polite", "stubborn"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_within_five_seconds_with_one_line(kind, number, code):
    process = subprocess.Popen(
        [sys.executable, "-c", STUBBORN, kind], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    child = int(process.stdout.readline())
    start = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert time.monotonic() - start < 5.0
    assert err == "stopped: nothing was begun; start the same command again.\n"
    for _ in range(50):  # the system may take a moment to collect it
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            return
        time.sleep(0.1)
    raise AssertionError("a child is alive")


def test_several_processes_need_a_program(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
    with pytest.raises(SystemExit) as exit:
        launch(print, 2)
    assert exit.value.code == 2
    assert "several processes need a program" in capsys.readouterr().err


def test_a_program_is_started_again_as_it_was(monkeypatch, tmp_path):
    from fastreid_uns.engine.launch import _this_program

    main = types.ModuleType("__main__")
    main.__file__ = str(tmp_path / "mine.py")
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert _this_program() == [str(tmp_path / "mine.py")]
    main.__spec__ = types.SimpleNamespace(name="mine.train.__main__")
    assert _this_program() == ["-m", "mine.train"]


@pytest.mark.parametrize(
    ("codes", "code", "line"),
    [
        ({0: 2, 1: -15}, 2, ""),
        ({0: 143, 1: 1}, 1, ""),
        ({0: 2, 1: -9}, 2, ""),  # frozen, and told by the other one
        ({0: 3, 1: -9}, 137, "process 1 of 2 was killed (SIGKILL)"),
        ({0: -11, 1: 143}, 139, "process 0 of 2 was killed (SIGSEGV)"),
        ({0: 143, 1: 143}, 143, ""),
    ],
)
def test_the_process_that_failed_first_gives_the_code(codes, code, line, capsys):
    from fastreid_uns.engine.launch import _code_of

    assert _code_of(codes, 2) == code
    err = capsys.readouterr().err
    assert line in err
    assert bool(err) == bool(line)


def two_processes(config: Path, *changes: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "tools/train_net.py"), "--config-file", str(config), "--num-gpus", "2"]
    return subprocess.Popen(
        [*command, *changes],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def process_of_rank(rank: int, parent: int) -> int:
    """Number of the process that torchrun started for a rank."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                above = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if above == parent and f"\0RANK={rank}\0".encode() in b"\0" + (entry / "environ").read_bytes():
                    return int(entry.name)
            except OSError:
                continue
    raise AssertionError(f"no process of rank {rank}")


@pytest.fixture
def endless(tiny, tmp_path) -> Path:
    """A config file of a run that does not end by itself."""
    from fastreid_uns.config import load_config

    changes = ["LOG.WRITERS=[text, json]", "PSEUDO_LABELS.MIN_SAMPLES=2", "PSEUDO_LABELS.K1=8", "SOLVER.EPOCHS=100000"]
    file = tmp_path / "endless.yaml"
    file.write_text(load_config(overrides=[*tiny, *changes, "TEST.PERIOD=0"]).dump())
    return file


def ended(process: subprocess.Popen, seconds: float) -> tuple[str, str]:
    try:
        return process.communicate(timeout=seconds)
    finally:
        process.kill()


@pytest.mark.slow
def test_an_error_of_all_processes_is_said_once(endless):
    out, err = ended(two_processes(endless, "SOLVER.EPOCH", "3"), 60)
    assert out == ""
    assert err == "error: command line: unknown key SOLVER.EPOCH; did you mean EPOCHS?" + err.partition("EPOCHS?")[2]
    assert err.count("\n") == 1


@pytest.mark.slow
def test_processes_of_a_second_run_are_refused_by_one_line(endless, tmp_path):
    from fastreid_uns.engine.run_folder import RunFolder

    run = RunFolder(tmp_path / "run")
    run.claim()
    process = two_processes(endless)
    _, err = ended(process, 60)
    assert process.returncode == 2
    assert f"run is in use by process {os.getpid()} on " in err
    assert err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["killed", "frozen"])
def test_a_rank_that_dies_or_freezes_ends_the_run_with_its_name(endless, fault):
    process = two_processes(endless, "DISTRIBUTED.TIMEOUT_MINUTES", "0.2")
    for line in process.stdout:
        if "epoch 1 " in line:
            break
    os.kill(process_of_rank(1, process.pid), signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
    out, err = ended(process, 90)
    assert "Traceback" not in out + err
    if fault == "killed":
        assert "error: process 1 of 2 was killed (SIGKILL), the others were ended." in err
        assert process.returncode == 128 + signal.SIGKILL
    else:
        assert "error: process 1 has not answered for " in err
        assert "was killed" not in err
        assert "its last stage: " in err
        assert "of epoch" in err
        assert process.returncode == 2
