import json
import logging
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest

from fastreid_uns.engine.log import JsonWriter, build_writers, setup_logging

ROOT = Path(__file__).parents[2]


def test_json_lines_of_epochs_that_run_again_are_dropped(tmp_path):
    writer = JsonWriter(tmp_path)
    for epoch in range(4):
        writer.epoch(epoch, 10 * (epoch + 1), {"loss": float(epoch)})
    writer.resume(2, [])
    writer.epoch(2, 30, {"loss": 9.0})
    lines = [json.loads(line) for line in writer.file.read_text().splitlines()]
    assert [(line["epoch"], line["iter"], line["loss"]) for line in lines] == [(0, 10, 0.0), (1, 20, 1.0), (2, 30, 9.0)]


def lines_of(file) -> list:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_lines_that_are_damaged_or_gone_come_back_from_the_checkpoint(tmp_path, caplog):
    logging.getLogger("fastreid_uns").propagate = True
    writer = JsonWriter(tmp_path)
    known = [{"epoch": epoch, "iter": 10 * epoch + 10, "loss": epoch / 2} for epoch in range(4)]
    writer.epoch(0, 10, {"loss": 0.0, "seconds_train": 5.0})
    with writer.file.open("a") as stream:
        stream.write('{"epoch": 2, "iter": 30, "loss": 1.0}\n5\n{"iter": 3}\n{"epoch": 3, "iter": 40, "lo')
    writer.resume(4, known)
    assert lines_of(writer.file) == [{**known[0], "seconds_train": 5.0}, *known[1:]]
    assert [record.getMessage().split(":")[1].split(" is")[0] for record in caplog.records] == [
        " line 3",
        " line 4",
        " line 5",
    ]
    writer.file.unlink()
    writer.resume(3, known)
    assert lines_of(writer.file) == known[:3]


def test_half_a_line_of_an_older_run_whose_checkpoint_has_no_lines_goes(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 0, "iter": 10}\n{"epoch": 1, "it')
    writer = JsonWriter(tmp_path)
    writer.resume(2, [])
    assert lines_of(writer.file) == [{"epoch": 0, "iter": 10}]


def test_a_full_disk_leaves_the_lines_before_and_no_half_one(tmp_path):
    """The limit on file sizes lets a part of the line through, as a full disk does."""
    code = f"""
        import resource
        from pathlib import Path
        from fastreid_uns.engine.log import JsonWriter
        writer = JsonWriter(Path({str(tmp_path)!r}))
        writer.epoch(0, 10, {{"loss": 1.0}})
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))
        writer.epoch(1, 20, {{"loss": 2.0}})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, timeout=120, capture_output=True)
    assert b"metrics.jsonl cannot be written (No space left on device)" in done.stderr
    assert lines_of(tmp_path / "metrics.jsonl") == [{"epoch": 0, "iter": 10, "loss": 1.0}]


def test_a_planted_link_is_not_written_through(tmp_path):
    (tmp_path / "victim").write_text("keep me")
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "victim")
    writer = JsonWriter(tmp_path)
    with pytest.raises(RuntimeError, match=r"metrics\.jsonl cannot be written"):
        writer.epoch(0, 10, {})
    writer.resume(0, [])
    writer.epoch(0, 10, {})
    assert (tmp_path / "victim").read_text() == "keep me"
    assert lines_of(writer.file) == [{"epoch": 0, "iter": 10}]


def test_text_line_of_an_epoch_groups_the_seconds(tmp_path, capsys):
    setup_logging(tmp_path)
    (writer,) = build_writers(["text"], tmp_path)
    writer.epoch(3, 40, {"clusters": 1234, "loss": 0.5, "seconds_extract": 1.25, "seconds_train": 60.0})
    line = capsys.readouterr().out
    assert "epoch 3  clusters 1,234  loss 0.5  seconds: extract 1.2  train 60.0" in line
    assert "clusters 1,234" in (tmp_path / "log.txt").read_text()
    logging.getLogger("fastreid_uns").handlers.clear()


def test_tensorboard_events_are_written(tmp_path):
    (writer,) = build_writers(["tensorboard"], tmp_path)
    writer.step(5, {"loss": 1.0})
    writer.epoch(0, 5, {"mAP": 50.0})
    writer.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"epoch/mAP" in file.read_bytes()


def test_a_service_is_imported_only_when_named_and_gets_the_numbers(tmp_path, monkeypatch):
    seen = []
    run = types.SimpleNamespace(log=lambda numbers, step: seen.append((step, numbers)), finish=lambda: seen.append(0))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: run))
    (writer,) = build_writers(["wandb"], tmp_path)
    writer.epoch(1, 20, {"mAP": 50.0})
    writer.close()
    assert seen == [(20, {"epoch": 1, "epoch/mAP": 50.0}), 0]


def test_unknown_writer(tmp_path):
    with pytest.raises(KeyError, match=r"LOG\.WRITERS: 'tensorbord' is unknown; did you mean tensorboard"):
        build_writers(["tensorbord"], tmp_path)
