"""A run from Python alone, and the names that a user of detectron2 types."""

import hashlib
import json
import logging
import sys
import types
from pathlib import Path

import pytest
import torch

from fastreid_uns import DefaultTrainer, load_config
from fastreid_uns.engine import default_setup
from fastreid_uns.hook import HookBase

ROOT = Path(__file__).parents[2]
SHORT = ["SOLVER.EPOCHS=1", "PSEUDO_LABELS.MIN_SAMPLES=2", "PSEUDO_LABELS.K1=8", "TEST.PERIOD=0"]


@pytest.fixture
def heard(caplog):
    """Messages of the package."""
    caplog.set_level(logging.INFO, logger="fastreid_uns")
    logging.getLogger("fastreid_uns").addHandler(caplog.handler)
    yield caplog
    logging.getLogger("fastreid_uns").removeHandler(caplog.handler)


def files(folder) -> dict[str, tuple[str, int]]:
    """Content and time of change of each file."""
    found = (file for file in folder.rglob("*") if file.is_file())
    return {str(f): (hashlib.sha256(f.read_bytes()).hexdigest(), f.stat().st_mtime_ns) for f in found}


def test_a_run_from_python_has_a_log_and_is_not_overwritten(tiny, capsys, heard):
    trainer = DefaultTrainer(load_config(overrides=[*tiny, *SHORT, "LOG.WRITERS=[text, json, tensorboard]"]))
    trainer.train()
    assert "epoch 0  " in capsys.readouterr().out
    log = (trainer.folder / "log.txt").read_text()
    assert "epoch 0  " in log
    assert "rank1" in log  # the table of scores
    assert {"config.yaml", "environment.txt", "metrics.jsonl"} <= {file.name for file in trainer.folder.iterdir()}
    before = files(trainer.folder)

    with pytest.raises(ValueError, match=r"run holds a run already \(checkpoint_0001\.pth\)\. Continue it with"):
        DefaultTrainer(trainer.cfg).train()
    with pytest.raises(ValueError, match="holds a run already"):
        default_setup(trainer.cfg, types.SimpleNamespace(resume=False, eval_only=False))
    for change, key in (("SOLVER.BASE_LR=0.5", r"SOLVER\.BASE_LR"), ("INPUT.SIZE=[16, 16]", r"INPUT\.SIZE")):
        other = load_config(overrides=[*tiny, *SHORT, change])
        with pytest.raises(ValueError, match=key):
            DefaultTrainer(other).resume_or_load(resume=True)
    assert files(trainer.folder) == before

    again = DefaultTrainer(trainer.cfg)
    again.resume_or_load(resume=True)
    again.train()
    assert "is finished, all 1 epochs are done. To train longer raise SOLVER.EPOCHS" in heard.text


def test_resume_where_nothing_is_saved_begins_with_a_warning(tiny, heard):
    trainer = DefaultTrainer(load_config(overrides=[*tiny, *SHORT]))
    trainer.resume_or_load(resume=True)
    assert "holds no checkpoint to resume from; the run starts from the beginning" in heard.text
    assert trainer.epochs_done == 0
    assert (trainer.folder / "config.yaml").is_file()


def test_evaluation_with_images_of_another_size_says_so(tiny, heard):
    trainer = DefaultTrainer(load_config(overrides=[*tiny, *SHORT, "DATASETS.TESTS.synthetic=null"]))
    trainer.train()
    weights = f"MODEL.WEIGHTS={trainer.folder / 'checkpoint_0001.pth'}"
    for change in ([], [weights]):
        heard.clear()
        DefaultTrainer.load_model(load_config(overrides=[*tiny, *SHORT, "INPUT.SIZE=[16, 16]", *change]))
        assert "INPUT.SIZE is [16, 16], but" in heard.text
        assert "was trained with [32, 16]" in heard.text


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_missing_package_is_named_with_what_to_install(tiny, monkeypatch, package):
    for name in ("wandb", "tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    cfg = load_config(overrides=[*tiny, *SHORT, f"LOG.WRITERS=[json, {package}]"])
    with pytest.raises(ImportError, match=rf"LOG\.WRITERS: {package} needs .*pip install {package}"):
        DefaultTrainer(cfg)


class Moments(HookBase):
    """Notes when it is called, and logs at each moment."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def _note(self, moment: str) -> None:
        self.seen.append(moment)
        self.trainer.log(**{moment: len(self.seen), "on_device": torch.tensor(2.0 * len(self.seen))})

    def before_train(self):
        self.seen.append("before_train")

    def before_epoch(self):
        self._note("before_epoch")

    def before_step(self):
        self._note("before_step")

    def after_backward(self):
        gradients = [p.grad for p in self.trainer.model.parameters() if p.requires_grad]
        assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
        self._note("after_backward")

    def after_step(self):
        self._note("after_step")

    def after_epoch(self):
        self._note("after_epoch")

    def after_train(self):
        self.seen.append("after_train")


def test_seven_moments_and_scalars_from_each_of_them(tiny):
    trainer = DefaultTrainer(load_config(overrides=[*tiny, *SHORT, "DATASETS.TESTS.synthetic=null"]))
    hook = Moments()
    trainer.register_hooks([None, hook])
    trainer.train()
    step = ["before_step", "after_backward", "after_step"]
    assert hook.seen == ["before_train", "before_epoch", *step, *step, "after_epoch", "after_train"]
    metrics = trainer.metrics
    # counted in `seen`: before_epoch 2nd, steps 3rd to 8th, after_epoch 9th
    assert (metrics["before_epoch"], metrics["after_epoch"]) == (2, 9)
    assert (metrics["before_step"], metrics["after_backward"], metrics["after_step"]) == (4.5, 5.5, 6.5)
    assert metrics["on_device"] == 2.0 * sum(range(2, 10)) / 8


def test_only_scalars_are_logged(tiny):
    trainer = DefaultTrainer(load_config(overrides=[*tiny, *SHORT, "DATASETS.TESTS.synthetic=null"]))
    with pytest.raises(ValueError, match=r"trainer\.log: x has shape \(3,\)"):
        trainer.log(x=torch.zeros(3))


def test_each_part_comes_from_a_builder_that_a_subclass_can_replace(tiny):
    called = []

    def noted(name):
        def build(cls, *args, **kwargs):
            called.append(name)
            return getattr(super(Mine, cls), name)(*args, **kwargs)

        return classmethod(build)

    names = ["train_set", "model", "train_loader", "test_loader", "optimizer", "lr_scheduler", "writers", "hooks"]
    names += ["evaluators", "generator"]
    Mine = type("Mine", (DefaultTrainer,), {f"build_{name}": noted(f"build_{name}") for name in names})
    Mine(load_config(overrides=[*tiny, *SHORT]))
    assert sorted(called) == sorted(f"build_{name}" for name in names)


def test_answers_hold_for_the_labels_of_any_generator(tiny):
    paths = [r.path for r in DefaultTrainer(load_config(overrides=[*tiny, *SHORT])).train_set.records]
    answers = [[paths[0], paths[1], "same"], [paths[0], paths[2], "different"]]
    trainer = DefaultTrainer(load_config(overrides=[*tiny, *SHORT, f"PSEUDO_LABELS.DECISIONS={json.dumps(answers)}"]))
    trainer.train()
    labels = trainer.train_set.pseudo.labels
    assert labels[0] == labels[1] >= 0
    assert labels[0] != labels[2]
    contradiction = json.dumps([*answers, [paths[1], paths[2], "same"]])
    with pytest.raises(ValueError, match="contradicts"):
        DefaultTrainer(load_config(overrides=[*tiny, *SHORT, f"PSEUDO_LABELS.DECISIONS={contradiction}"]))


def test_the_names_of_the_page_for_users_of_detectron2_exist():
    import re

    from fastreid_uns import FeatureExtractor, engine

    page = (ROOT / "projects/README.md").read_text().partition("## Coming from detectron2")[2]
    here = [row.split("|")[2] for row in page.splitlines() if row.startswith("| `")]
    assert len(here) > 10
    names = set(re.findall(r"build_\w+", " ".join(page.splitlines()))) - {"build_evaluator"}
    assert all(hasattr(DefaultTrainer, name) for name in {*names, "resume_or_load", "register_hooks", "test", "log"})
    moments = set(re.findall(r"(?:before|after)_\w+", page))
    assert moments == {name for name in vars(HookBase) if name.startswith(("before_", "after_"))}
    assert callable(FeatureExtractor.from_checkpoint)
    for name in ("default_argument_parser", "default_setup", "launch"):
        assert callable(getattr(engine, name))
