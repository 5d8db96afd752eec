import json
import logging
import sys
import types

import pytest

from fastreid_uns.engine.log import JsonWriter, build_writers, setup_logging


def test_json_lines_of_epochs_that_run_again_are_dropped(tmp_path):
    writer = JsonWriter(tmp_path)
    for epoch in range(4):
        writer.epoch(epoch, 10 * (epoch + 1), {"loss": float(epoch)})
    writer.resume(2, [])
    writer.epoch(2, 30, {"loss": 9.0})
    lines = [json.loads(line) for line in writer.file.read_text().splitlines()]
    assert [(line["epoch"], line["iter"], line["loss"]) for line in lines] == [(0, 10, 0.0), (1, 20, 1.0), (2, 30, 9.0)]


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
