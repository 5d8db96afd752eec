"""The trial by force: what it compares, what it accepts as a refusal, and where it kills."""

import functools
import importlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tools/benchmark"))
import fault_commands
import faults

FOLDER = Path(faults.__file__).parent


def test_two_records_differ_where_they_do():
    one = {"lines": [{"epoch": 0, "loss": 0.5}], "weights": {"a": torch.ones(2)}, "nothing": float("nan")}
    assert faults.difference(one, {**one, "nothing": float("nan")}) == ""
    assert faults.difference(one, {**one, "lines": [{"epoch": 0, "loss": 0.6}]}) == "lines 0 loss: 0.5 and 0.6"
    assert faults.difference(one, {**one, "lines": []}) == "lines 0 is in one only"
    assert faults.difference(one, {**one, "weights": {"a": torch.tensor([1.0, 2.0])}}) == "weights a differ"
    assert faults.difference(one, {**one, "more": 1}) == " more is in one only"


@pytest.mark.parametrize(
    ("code", "text", "fault"),
    [
        (2, "error: SEED is many; a number is accepted.\n", ""),
        (0, "epoch 0 ...\n", "silent"),
        (2, "Traceback (most recent call last):\nerror: x\n", "traceback"),
        (1, "error: x\n", "exit code 1"),
        (2, "something\n", "exit code 2"),
        (None, "", "hung"),
    ],
)
def test_only_exit_code_two_with_a_message_is_a_refusal(code, text, fault):
    found = fault_commands.Ended(code, text).refusal
    assert found.startswith(fault)
    assert bool(found) == bool(fault)


def test_a_command_is_killed_before_the_line_that_is_asked_for(tmp_path):
    """Two appended bytes: killed in the first call, in the second one, and after the last line."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys; from pathlib import Path; from fastreid_uns.utils.atomic import append\n"
        "append(Path(sys.argv[1]), b'a'); append(Path(sys.argv[1]), b'b')\n"
    )
    counted = fault_commands.run([str(program), str(tmp_path / "counted")], line=0)
    assert counted.code == 0
    total = int(counted.text.split()[-1])
    written = {}
    for line in (1, total, total + 1):
        file = tmp_path / str(line)
        code = fault_commands.run([str(program), str(file)], line=line).code
        written[line] = (code, file.read_bytes() if file.is_file() else b"")
    assert written == {1: (-signal.SIGKILL, b""), total: (-signal.SIGKILL, b"ab"), total + 1: (0, b"ab")}


@pytest.mark.parametrize("cold", [False, True])
def test_a_command_says_how_it_ended(tmp_path, cold):
    program = tmp_path / "program.py"
    program.write_text("import sys, time\nprint(sys.argv[1:])\nif sys.argv[1] == 'wait': time.sleep(60)\nsys.exit(3)\n")
    assert fault_commands.run([str(program), "a", "b"], cold=cold) == (3, "['a', 'b']\n")
    command = fault_commands.Command([str(program), "wait"], cold=cold)
    assert command.runs()
    command.kill()
    assert command.wait().code == -signal.SIGKILL
    assert not command.runs()
    assert fault_commands.Command([str(program), "wait"], cold=cold).wait(seconds=0.2).code is None
    program.write_text("open('/dev/null/x')\n")
    ended = fault_commands.run([str(program)], cold=cold)
    assert ended.code == 1
    assert ended.text.endswith("NotADirectoryError: [Errno 20] Not a directory: '/dev/null/x'\n")
    program.write_text(f"open({str(tmp_path / 'big')!r}, 'wb', buffering=0).write(bytes(20))\n")
    fault_commands.run([str(program)], cold=cold, limit=5)
    assert (tmp_path / "big").stat().st_size == 5


def test_the_table_counts_cases_and_faults():
    outcomes = [
        faults.Outcome("flips", "a", ""),
        faults.Outcome("flips", "b", "silent"),
        faults.Outcome("two", "c", ""),
    ]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in faults.table(outcomes).splitlines()[2:]]
    assert [(row[0], row[2], row[3]) for row in rows] == [("flips", "2", "1"), ("two", "1", "0")]


@pytest.mark.slow
def test_a_few_faults_are_found_harmless(tmp_path):
    counts = ["--kills", "2", "--lines", "2", "--truncations", "3", "--flips", "5", "--inputs", "3"]
    few = ["--methods", "core", "--only", "kills", "lines", "truncations", "flips", "inputs"]
    command = [sys.executable, str(FOLDER / "faults.py"), *counts, *few, "--output", str(tmp_path / "faults.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(json.loads((tmp_path / "faults.json").read_text())["outcomes"]) >= 14


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_is_struck_in_the_function_that_is_asked_for(tmp_path, monkeypatch, number):
    monkeypatch.setattr(fault_commands, "STRUCK", tmp_path / "struck")
    program = tmp_path / "program.py"
    program.write_text(
        "import sys; from pathlib import Path; from fastreid_uns.utils import atomic\n"
        "print('begun', flush=True); atomic.append(Path(sys.argv[1]), b'a')\n"
    )
    words = [str(program), str(tmp_path / "written")]
    code, text = fault_commands.Command(words, struck=("fastreid_uns.utils.atomic:append", number)).wait()
    assert text.startswith("begun")
    assert code == (-number if number == signal.SIGTERM else 1)  # a traceback of KeyboardInterrupt
    assert not (tmp_path / "written").exists()
    assert float((tmp_path / "struck").read_text()) > 0


@pytest.mark.parametrize("places", [faults.STAGES, faults.STAGES_OF_PHOTOS])
def test_the_stages_are_functions_that_exist(places):
    for place in places.values():
        module, _, name = place.partition(":")
        assert callable(functools.reduce(getattr, name.split("."), importlib.import_module(module))), place


def test_what_is_heard_of_a_signal():
    line = "stopped: all is saved.\n"
    assert faults.unheard(fault_commands.Ended(130, line), 1.0, signal.SIGINT) == ""
    for ended, seconds in (
        (fault_commands.Ended(0, line), 1.0),
        (fault_commands.Ended(143, line), 1.0),
        (fault_commands.Ended(130, line * 2), 1.0),
        (fault_commands.Ended(130, ""), 1.0),
        (fault_commands.Ended(130, f"Traceback\n{line}"), 1.0),
        (fault_commands.Ended(130, line), 5.1),
        (fault_commands.Ended(130, line), float("nan")),
    ):
        assert faults.unheard(ended, seconds, signal.SIGINT), ended
