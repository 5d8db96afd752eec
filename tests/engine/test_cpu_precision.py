"""The precision of a CPU is that which was measured, once, and a run keeps the one that it began in."""

import json
import time

import pytest
import torch
from torch import nn

from fastreid_uns.config import load_config
from fastreid_uns.engine import cpu_precision
from fastreid_uns.engine.default import DefaultTrainer


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A CPU with bfloat16, and the seconds that it takes; the file of results is in `tmp_path`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    cpu_precision.faster_precision.cache_clear()
    yield lambda float32, bfloat16, sound=True: (
        monkeypatch.setattr(cpu_precision, "least_seconds", lambda *actions, rounds: [float32, bfloat16]),
        monkeypatch.setattr(cpu_precision, "is_sound", lambda: sound),
        cpu_precision.faster_precision.cache_clear(),
    )
    cpu_precision.faster_precision.cache_clear()


@pytest.mark.parametrize(
    ("float32", "bfloat16", "sound", "chosen"),
    [(2.0, 1.0, True, torch.bfloat16), (1.0, 1.5, True, None), (1.04, 1.0, True, None), (2.0, 1.0, False, None)],
)
def test_the_faster_one_if_it_is_sound(machine, float32, bfloat16, sound, chosen):
    machine(float32, bfloat16, sound)
    assert cpu_precision.faster_precision() is chosen


def test_it_is_measured_once_for_each_machine(machine, tmp_path):
    machine(2.0, 1.0)
    assert cpu_precision.faster_precision() is torch.bfloat16
    machine(1.0, 2.0)
    assert cpu_precision.faster_precision() is torch.bfloat16
    file = tmp_path / "cache/fastreid_uns/precision.json"
    (name,) = json.loads(file.read_text())
    assert torch.__version__ in name
    file.write_text("no JSON")
    cpu_precision.faster_precision.cache_clear()
    assert cpu_precision.faster_precision() is None


class Halved(nn.Conv2d):
    """A convolution that bfloat16 makes faster, and wrong for so many images."""

    seconds, wrong = 0.01, 0

    def forward(self, images):
        low = torch.is_autocast_enabled("cpu")
        if not low:
            time.sleep(self.seconds)
        return super().forward(images) * (torch.nan if low and len(images) == self.wrong else 1)


@pytest.mark.parametrize(("seconds", "wrong", "chosen"), [(0.02, 0, torch.bfloat16), (0, 0, None), (0.02, 3, None)])
def test_inference_is_measured_on_the_network_itself(machine, seconds, wrong, chosen):
    network = Halved(3, 4, 3).requires_grad_(False)
    network.seconds, network.wrong = seconds, wrong
    if not seconds:
        machine(1.0, 1.0)
    images = torch.rand(4, 3, 8, 8)
    assert cpu_precision.faster_inference(network, images) is chosen
    network.seconds, network.wrong = (0.02, 0) if chosen is None else (0, 0)
    assert cpu_precision.faster_inference(network, images) is chosen  # it is remembered


def test_real_convolutions_can_be_timed(monkeypatch):
    monkeypatch.setattr(cpu_precision, "FASTER", 0)
    assert cpu_precision._is_faster(map(cpu_precision._convolution, cpu_precision.SHAPES), 1)


def test_a_resumed_run_keeps_its_precision(machine, tiny):
    machine(1.0, 2.0)
    keys = [*tiny, "SOLVER.AMP=auto", "TEST.PERIOD=0"]
    first = DefaultTrainer(load_config(overrides=[*keys, "SOLVER.EPOCHS=1"]))
    assert first.amp is None
    first.train()
    machine(2.0, 1.0)
    (cpu_precision._file()).unlink()
    longer = DefaultTrainer(load_config(overrides=[*keys, "SOLVER.EPOCHS=2"]))
    assert longer.amp is None
    assert all(evaluator.amp is None for evaluator in longer.build_hooks(longer.cfg, longer)[3].evaluators.values())
