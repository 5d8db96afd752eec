"""The command line, as a user types it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fastreid_uns.commands import train

ROOT = Path(__file__).parents[2]


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools/train_net.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def config(tiny, tmp_path) -> Path:
    from fastreid_uns.config import load_config

    cfg = load_config(
        overrides=[*tiny, "LOG.WRITERS=[text, json]", "PSEUDO_LABELS.MIN_SAMPLES=2", "PSEUDO_LABELS.K1=8"]
    )
    file = tmp_path / "tiny.yaml"
    file.write_text(cfg.dump())
    return file


def table(output: str) -> str:
    return output[output.index("data set") :].strip()


def test_train_refuse_to_overwrite_resume_and_evaluate(config, tmp_path):
    trained = command("--config-file", str(config))
    assert trained.returncode == 0, trained.stderr
    assert "epoch 1  " in trained.stdout
    assert "seconds: extract" in trained.stdout

    again = command("--config-file", str(config))
    assert again.returncode == 2
    assert "holds a run already (checkpoint_0002.pth). Continue it with --resume" in again.stderr

    resumed = command("--config-file", str(config), "--resume", "SOLVER.EPOCHS", "3")
    assert resumed.returncode == 0, resumed.stderr
    assert "after 2 epochs" in resumed.stdout
    assert "epoch 2  " in resumed.stdout
    assert "epoch 1  " not in resumed.stdout

    evaluated = command("--config-file", str(config), "--eval-only")
    assert evaluated.returncode == 0, evaluated.stderr
    assert table(evaluated.stdout) == table(resumed.stdout)

    named = command(
        "--config-file", str(config), "--eval-only", "MODEL.WEIGHTS", str(tmp_path / "run/checkpoint_0003.pth")
    )
    assert table(named.stdout) == table(resumed.stdout)


def test_two_processes_by_number_of_gpus(config):
    done = command("--config-file", str(config), "--num-gpus", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1  ") == 1
    assert yaml.safe_load((config.parent / "run/environment.txt").read_text())["processes"] == 2


def test_errors_are_one_line_and_the_traceback_is_in_the_log(config):
    done = command("--config-file", str(config), "--eval-only")
    assert done.returncode == 2
    assert done.stderr.strip() == f"error: {config.parent / 'run'}: no checkpoint was found. " + (
        "Train first, or set OUTPUT_DIR or MODEL.WEIGHTS."
    )
    assert "Traceback" in (config.parent / "run/log.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["SOLVER.EPOCH", "3"], "error: command line: unknown key SOLVER.EPOCH; did you mean EPOCHS?"),
        (["--eval-only", "MODEL.WEIGHTS", "gone.pth"], "gone.pth"),
    ],
)
def test_errors_before_anything_starts(config, arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--config-file", str(config), *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
