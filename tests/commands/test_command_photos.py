"""group, add, identify, review and serve as they are typed, with a small network of random weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastreid_uns.commands import asking, main, review, serve
from fastreid_uns.commands.terminal import Terminal
from fastreid_uns.photos.decisions import Decisions
from fastreid_uns.photos.store import PhotoRun
from fastreid_uns.photos.verdict import open_pairs

ROOT = Path(__file__).parents[2]


def draw_things(folder: Path, things: range, each: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for thing in things:
        pattern = np.kron(np.random.default_rng(thing).integers(0, 256, (4, 4, 3)), np.ones((8, 8, 1)))
        for number in range(each):
            noise = np.random.default_rng([thing, number]).normal(0, 4, pattern.shape)
            Image.fromarray(np.clip(pattern + noise, 0, 255).astype(np.uint8)).save(folder / f"{thing} {number}.png")


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    """A network without weights, small photos, no training."""
    file = tmp_path_factory.mktemp("network") / "network.yaml"
    file.write_text("MODEL: {WEIGHTS: '', BACKBONE: {NAME: timm, MODEL: tf_efficientnet_lite0}}\n")
    return ["--config-file", str(file), "--size", "32", "32", "--no-training"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, options) -> Path:
    """Photos, and what `group` made of them."""
    place = tmp_path_factory.mktemp("place")
    draw_things(place / "photos", range(4), 6)
    assert main(["group", str(place / "photos"), "--output", str(place / "out"), "--no-questions", *options]) == 0
    return place


def said(capsys, *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_group_says_what_was_found_and_what_comes_next(tmp_path, capsys, options):
    draw_things(tmp_path / "my photos", range(2), 3)
    (tmp_path / "my photos" / "IMG_1.HEIC").write_bytes(b"x")
    out = tmp_path / "my out"
    code, printed, _ = said(capsys, "group", tmp_path / "my photos", "--output", out, *options)
    assert code == 0
    lines = printed.splitlines()
    assert lines[0].startswith("6 photos in ")
    assert "passed over: 1 .heic; convert pictures to JPEG or PNG to use them" in lines
    assert "6 photos together" in printed
    assert "unverified" in printed
    assert lines[-1].startswith(f"next:     fastreid-uns review '{out}'")
    assert "6 photos in" in (out / "log.txt").read_text()
    code, _, errors = said(capsys, "group", tmp_path / "my photos", "--output", out, *options)
    assert code == 2
    assert "--resume" in errors


def test_resume_takes_folder_and_wishes_from_the_run(place, capsys):
    before = (place / "out" / "groups.csv").read_bytes()
    code, printed, _ = said(capsys, "group", "--resume", place / "out", "--no-questions")
    assert code == 0
    assert "weights: random numbers" in printed
    assert (place / "out" / "groups.csv").read_bytes() == before


def refusal(capsys, words: list[str]) -> str:
    """What `group` says when it does not accept its arguments."""
    try:
        code = main(["group", *words])
    except SystemExit as end:
        return str(end.code)
    return capsys.readouterr().err if code == 2 else ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["photos"], "no output folder is named"),
        (["photos", "--output", "a", "--resume", "b"], "name two folders"),
        (["none", "--output", "a"], "no such folder"),
        (["--output", "a"], "no folder of photos is named"),
        (["--resume", "none"], "no grouped photos were found"),
        (["photos", "--output", "a", "--size", "8", "8"], "from 32 pixels are accepted"),
        (["photos", "--output", "photos"], "same folder"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    done = refusal(capsys, words)
    assert message in done
    assert done.count("\n") <= 1
    assert not (tmp_path / "a").exists()


def test_identify(place, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes(b"no photo")
    photo = place / "photos" / "2 3.png"
    code, printed, _ = said(capsys, "identify", place / "out", photo, tmp_path / "broken.jpg", "--json")
    lines = [json.loads(line) for line in printed.splitlines()]
    assert code == 2  # one of them could not be read
    assert lines[0]["photo"] == str(photo)
    assert lines[0]["answer"] in ("unsure", "new")  # the groups are unverified
    assert ("note" in lines[0]) == (lines[0]["answer"] == "unsure")
    assert lines[1]["answer"] == "unreadable"
    code, printed, errors = said(capsys, "identify", place / "out", place / "photos")
    assert code == 0
    assert len(printed.splitlines()) == 24
    assert "unsure" in printed
    assert f"the groups were not checked; answer 15 questions with `fastreid-uns review {place / 'out'}`" in errors
    assert said(capsys, "identify", tmp_path, photo)[0] == 2


def test_add(place, tmp_path, capsys, options):
    draw_things(tmp_path / "photos", range(3), 4)
    out = tmp_path / "out"
    assert main(["group", str(tmp_path / "photos"), "--output", str(out), "--no-questions", *options]) == 0
    before = {one.path: one.group for one in PhotoRun(out).groups()}
    draw_things(tmp_path / "more", range(2, 4), 3)
    for number in range(3):
        (tmp_path / "more" / f"2 {number}.png").unlink()
    code, printed, _ = said(capsys, "add", out, tmp_path / "more")
    assert code == 0
    assert "3 photos added" in printed
    after = {one.path: one.group for one in PhotoRun(out).groups()}
    assert {path: after[path] for path in before} == before
    assert len(after) == 15
    assert said(capsys, "add", out, tmp_path / "more")[0] == 2


def test_questions_on_the_terminal(place, tmp_path, monkeypatch, capsys):
    import shutil

    shutil.copytree(place / "out", tmp_path / "out", symlinks=True)
    run = PhotoRun(tmp_path / "out")
    pairs = open_pairs(run)
    answers = iter(["what?", "h", "s", "x", "u", "q"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    asking.ask(run)
    rows = Decisions(tmp_path / "out" / "decisions.csv").rows()
    assert [(row.first[0], row.second[0], row.answer) for row in rows] == [
        (*pairs[0], "same"),
        (*pairs[1], "unsure"),
    ]
    assert run.photo(pairs[0][0]).as_uri() in capsys.readouterr().out

    def closed(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", closed)
    asking.ask(run)
    assert len(Decisions(tmp_path / "out" / "decisions.csv").rows()) == 2


def test_review_ends_with_what_the_answers_tell(place, tmp_path, monkeypatch, capsys):
    pytest.importorskip("starlette", reason="needs the extra `review`")
    import shutil

    shutil.copytree(place / "out", tmp_path / "out", symlinks=True)
    run = PhotoRun(tmp_path / "out")

    def answered(server):
        for pair in open_pairs(run):
            Decisions(run.folder / "decisions.csv").pair(*pair, "same")

    monkeypatch.setattr("fastreid_uns.photos.server.Server.run", answered)
    code, printed, _ = said(capsys, "review", tmp_path / "out", "--no-browser")
    assert code == 0
    assert printed.startswith("http://127.0.0.1:")
    assert "are the same individual." in printed
    assert f"group --resume {tmp_path / 'out'}" in printed
    assert run.about["audit"]["verified"]
    monkeypatch.setattr("fastreid_uns.photos.server.Server.run", lambda server: None)
    code, printed, _ = said(capsys, "review", tmp_path / "out", "--no-browser")
    assert "are the same individual" not in printed  # nothing was answered


def test_serve_identifies_by_the_newest_groups(place):
    newest = serve._Newest(PhotoRun(place / "out"), "cpu")
    content = (place / "photos" / "1 1.png").read_bytes()
    assert newest.identify(content)["answer"] in ("unsure", "new")
    assert newest.identify(content) == newest.identify(content)


def test_ctrl_c_on_the_page_ends_the_server_only(place, monkeypatch):
    pytest.importorskip("starlette", reason="needs the extra `review`")

    def interrupted(server):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)

    monkeypatch.setattr("fastreid_uns.photos.server.Server.run", interrupted)
    before = signal.getsignal(signal.SIGINT)
    review.show(PhotoRun(place / "out"), browser=False)
    assert signal.getsignal(signal.SIGINT) is before


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    terminal = Terminal()
    terminal.share("train", 0.25, 90)
    terminal.share("train", 0.26, 80)
    terminal.share("features", 0.9, None)
    assert capsys.readouterr().err.splitlines() == [
        "train: 25% of the whole, 1 min 30 s left",
        "features: 90% of the whole",
    ]


@pytest.mark.slow
def test_an_interrupted_command_says_how_to_go_on_and_does(tmp_path, options):
    draw_things(tmp_path / "photos", range(12), 10)
    words = ["group", "photos", "--output", "out", "--no-questions", *options[:2], "--size", "96", "96"]
    command = [sys.executable, "-m", "fastreid_uns.commands", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment)
    for line in started.stderr:
        if "of the whole" in line:
            started.send_signal(signal.SIGINT)
            break
    _, errors = started.communicate()
    assert started.returncode == 130
    assert "the same command goes on from there" in errors
    done = subprocess.run([*command, "--no-training"], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "120 photos together" in done.stdout


def test_help_loads_nothing_heavy():
    for name in ("group", "review", "add", "identify", "serve"):
        code = f"import sys, fastreid_uns.commands.{name}; print('torch' in sys.modules or 'numpy' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert done.stdout.strip() == "False", (name, done.stderr)
