"""The whole road on the generated set: train, evaluate, stop, resume, use."""

import json
from pathlib import Path

import pytest
import torch

from fastreid_uns.config import load_config
from fastreid_uns.engine.default import DefaultTrainer
from fastreid_uns.engine.recluster import ReclusterHook
from fastreid_uns.hook import HookBase
from fastreid_uns.structures import NoClusters, PseudoLabels
from fastreid_uns.utils import checkpoint

RECIPE = [
    "PSEUDO_LABELS.K1=8",
    "PSEUDO_LABELS.K2=3",
    "PSEUDO_LABELS.MIN_SAMPLES=2",
    "SOLVER.BASE_LR=0.002",
    "MODEL.BACKBONE.WIDTH=8",
    "INPUT.AUGMENTS.train={FLIP: 0.5, PAD: 2, ERASE: 0.0}",
]


def run(overrides: list[str], resume: bool = False) -> DefaultTrainer:
    trainer = DefaultTrainer(load_config(overrides=overrides))
    if resume:
        trainer.resume()
    trainer.train()
    return trainer


class Crash(HookBase):
    """Ends the process in the middle of an epoch, as far as the trainer can tell."""

    def __init__(self, epoch: int):
        self.epoch = epoch

    def after_step(self):
        if self.trainer.epoch == self.epoch and self.trainer.iter % 6 == 3:
            raise KeyboardInterrupt


def flat(state, prefix="") -> dict[str, torch.Tensor]:
    """All tensors and numbers of a nested state."""
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in flat(value, f"{prefix}{key}/").items()}
    if isinstance(state, (list, tuple)):
        return {k: v for i, value in enumerate(state) for k, v in flat(value, f"{prefix}{i}/").items()}
    return {prefix: torch.as_tensor(state)} if isinstance(state, (torch.Tensor, int, float)) else {}


def assert_equal_states(one: dict, two: dict) -> None:
    one, two = flat(one), flat(two)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def test_training_raises_map_over_the_untrained_network(tiny, learning_set):
    recipe = [
        *tiny,
        *RECIPE,
        f"DATASETS.TRAIN={json.dumps(learning_set)}",
        f"DATASETS.TESTS.synthetic={json.dumps(learning_set)}",
        "INPUT.SIZE=[48, 24]",
        "INPUT.AUGMENTS.train={FLIP: 0.5, PAD: 2, ERASE: 0.0, JITTER: 0.8, BRIGHTNESS: 0.3, CONTRAST: 0.3}",
        "MODEL.BACKBONE.WIDTH=16",
        "PSEUDO_LABELS.K1=12",
        "DATALOADER.SAMPLER.BATCH_SIZE=32",
        "SOLVER.EPOCHS=6",
        "SOLVER.ITERS_PER_EPOCH=20",
        "LOG.CLUSTER_QUALITY=true",
    ]
    cfg = load_config(overrides=recipe)
    trainer = DefaultTrainer(cfg)
    before = DefaultTrainer.test(cfg, trainer.model)["synthetic"]["mAP"]
    trainer.train()
    assert trainer.results["synthetic"]["mAP"] > before + 20
    lines = [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(6))
    assert {"clusters", "outliers", "ARI", "loss", "loss_contrast"} <= lines[0].keys()
    stages = {"seconds_extract", "seconds_neighbours", "seconds_cluster", "seconds_train", "seconds_checkpoint"}
    assert stages <= lines[1].keys()  # a line has the checkpoint before it
    for line in lines[1:]:  # the first epoch imports libraries as well
        spent = [value for key, value in line.items() if key.startswith("seconds_") and key != "seconds_epoch"]
        assert 0.8 * line["seconds_epoch"] < sum(spent) < line["seconds_epoch"]
    assert "seconds_evaluate" in lines[-1]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert (trainer.folder / "config.yaml").is_file()
    assert "torch" in (trainer.folder / "environment.txt").read_text()


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_resume_equals_an_uninterrupted_run_bit_for_bit(tiny, tmp_path, stop_after):
    recipe = [*tiny, *RECIPE, "SOLVER.ITERS_PER_EPOCH=6", "MODEL.MOMENTUM_ENCODER=true", "MODEL.ENCODER_MOMENTUM=0.5"]
    straight = run([*recipe, "SOLVER.EPOCHS=4", f"OUTPUT_DIR={tmp_path / 'straight'}"])
    torch.rand(7)
    parts = [*recipe, "SOLVER.EPOCHS=4", f"OUTPUT_DIR={tmp_path / 'parts'}"]
    killed = DefaultTrainer(load_config(overrides=parts))
    killed.add_hook(Crash(stop_after))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    torch.rand(5)
    resumed = run(parts, resume=True)
    assert_equal_states(resumed.state_dict(), straight.state_dict())
    lines = [json.loads(line) for line in (straight.folder / "metrics.jsonl").read_text().splitlines()]
    assert len({line["clusters"] for line in lines}) > 1
    again = [json.loads(line) for line in (resumed.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["clusters"] for line in again] == [line["clusters"] for line in lines]


def test_equal_seeds_equal_weights_and_the_cache_does_not_matter(tiny, tmp_path):
    recipe = [*tiny, *RECIPE]
    states = [
        run([*recipe, *change, f"OUTPUT_DIR={tmp_path / str(i)}"]).model.state_dict()
        for i, change in enumerate([["DATALOADER.CACHE=none"], ["DATALOADER.CACHE=device"], ["SEED=2"]])
    ]
    assert_equal_states(states[0], states[1])
    with pytest.raises(AssertionError):
        assert_equal_states(states[0], states[2])


def test_resume_refuses_another_config(tiny):
    run([*tiny, *RECIPE, "SOLVER.EPOCHS=1"])
    with pytest.raises(ValueError, match=r"these keys differ: PSEUDO_LABELS\.EPS: 0\.6 -> 0\.5"):
        run([*tiny, *RECIPE, "PSEUDO_LABELS.EPS=0.5"], resume=True)


def test_checkpoints_keep_the_newest_and_the_best(tiny):
    trainer = run([*tiny, *RECIPE, "SOLVER.EPOCHS=3", "TEST.PERIOD=1", "CHECKPOINT.KEEP=2"])
    names = sorted(file.name for file in trainer.folder.glob("*.pth"))
    assert names == ["best.pth", "checkpoint_0002.pth", "checkpoint_0003.pth"]
    assert checkpoint.last_checkpoint(trainer.folder).name == "checkpoint_0003.pth"


def test_periods_of_zero_mean_never(tiny):
    trainer = run([*tiny, *RECIPE, "TEST.PERIOD=0", "CHECKPOINT.PERIOD=0", "LOG.PERIOD_STEPS=0"])
    assert not list(trainer.folder.glob("*.pth"))
    assert "mAP" in trainer.results["synthetic"]


def test_patience_stops_the_run_and_saves(tiny):
    trainer = run([*tiny, *RECIPE, "SOLVER.EPOCHS=9", "SOLVER.BASE_LR=0.0", "TEST.PERIOD=1", "TEST.PATIENCE=1"])
    assert trainer.epochs_done < 9
    assert "mAP has not risen" in trainer.stop_reason
    assert checkpoint.last_checkpoint(trainer.folder).name == f"checkpoint_{trainer.epochs_done:04d}.pth"


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tiny):
    trainer = DefaultTrainer(load_config(overrides=[*tiny, *RECIPE, "SOLVER.EPOCHS=3"]))
    forward = trainer.model.forward
    trainer.model.forward = lambda batch: {
        name: value * (torch.nan if trainer.iter >= 3 else 1.0) for name, value in forward(batch).items()
    }
    with pytest.raises(RuntimeError, match="not finite since step 3"):
        trainer.train()
    content = checkpoint.load_checkpoint(checkpoint.last_checkpoint(trainer.folder))
    assert content["epochs_done"] == 1
    assert all(torch.isfinite(value).all() for value in content["model"].values())


def test_all_outliers_in_the_first_epoch_stop_the_run(tiny):
    with pytest.raises(NoClusters, match=r"every one of 96 images is an outlier at EPS 0\.01.*Raise EPS"):
        run([*tiny, *RECIPE, "PSEUDO_LABELS.EPS=0.01", "PSEUDO_LABELS.MIN_SAMPLES=9"])


def test_all_outliers_later_keep_the_labels_of_before(tiny, caplog, monkeypatch):
    monkeypatch.setattr("logging.Logger.propagate", True, raising=False)
    trainer = DefaultTrainer(load_config(overrides=[*tiny, *RECIPE]))
    hook = trainer.hook(ReclusterHook)
    generate, seen = hook.generator.__call__, []

    class FailsLater(type(hook.generator)):
        def __call__(self, bank, epoch):
            if epoch == 1:
                raise NoClusters("PSEUDO_LABELS: nothing found.")
            seen.append(generate(bank, epoch))
            return seen[-1]

    hook.generator.__class__ = FailsLater
    trainer.train()
    assert isinstance(hook.pseudo, PseudoLabels)
    assert torch.equal(hook.pseudo.labels, seen[0].labels)


def test_evaluation_of_the_last_checkpoint_gives_the_numbers_of_training(tiny):
    trainer = run([*tiny, *RECIPE])
    content = checkpoint.load_checkpoint(checkpoint.last_checkpoint(trainer.folder))
    model = DefaultTrainer.build_model(trainer.cfg, content["num_images"])
    checkpoint.load_model(model, content, "last")
    assert DefaultTrainer.test(trainer.cfg, model) == trainer.results


def test_a_labelled_source_beside_the_unlabelled_target(tiny, tiny_set):
    import yaml

    source = yaml.safe_dump({**tiny_set, "SEED": 5}, default_flow_style=True, width=10**6).strip()
    trainer = run([*tiny, *RECIPE, f"DATASETS.SOURCES.other={source}", "MODEL.DOMAIN_BN=true"])
    assert len(trainer.train_set) == trainer.train_set.num_images + 96
    classes = trainer.train_set.num_classes
    clusters = trainer.hook(ReclusterHook).pseudo.num_clusters
    assert len(trainer.model.memory.features) == classes + clusters


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision_compile_free_run(tiny, amp):
    wider = "MODEL.BACKBONE.LAST_STRIDE=1"  # than the maps at which bfloat16 convolutions of torch are wrong on AMX
    trainer = run([*tiny, *RECIPE, wider, f"SOLVER.AMP={amp}", "SOLVER.CLIP_NORM=1.0", "SOLVER.ACCUMULATE=2"])
    assert 0 < trainer.results["synthetic"]["mAP"] <= 100


def test_a_training_set_without_a_name():
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN has no NAME"):
        DefaultTrainer.build_train_set(load_config(), torch.device("cpu"))


def test_one_image_is_too_few(tiny, tmp_path):
    from PIL import Image

    (tmp_path / "one").mkdir()
    Image.new("RGB", (16, 32)).save(tmp_path / "one" / "a.png")
    change = [f"DATASETS.TRAIN={{NAME: folder, ROOT: {Path(tmp_path / 'one')}}}"]
    with pytest.raises(ValueError, match=r"folder has 1 training image"):
        DefaultTrainer(load_config(overrides=[*tiny, *change]))
