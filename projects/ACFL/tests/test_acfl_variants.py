"""ACFL-C, ACFL-ST and ACFL-ViT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastreid_uns.config import load_config
from fastreid_uns.engine.default import DefaultTrainer
from fastreid_uns.hook import HookBase
from fastreid_uns.modeling.meta_arch import build_model
from fastreid_uns.projects.ACFL import camera, student
from fastreid_uns.projects.ACFL.tests.acfl_toy import CAMERAS, INDEX, LABELS, batch, build, features
from fastreid_uns.structures import FeatureBank, PseudoLabels

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("positives", ["all", "other"])
def test_camera_contrast_in_a_plain_loop(positives):
    model = build(camera.ACFLCamera, camera_weight=0.7, camera_negatives=2, camera_positives=positives)
    feats = features(model, batch().views[0])
    rows, cameras = model.memory.features.clone(), CAMERAS[INDEX]
    pairs = sorted({(int(a), int(c)) for a, c in zip(LABELS, CAMERAS, strict=True) if a >= 0})
    proxies = [F.normalize(rows[(a == LABELS) & (c == CAMERAS)].mean(0), dim=0) for a, c in pairs]
    costs = []
    for feat, label, place in zip(feats, LABELS[INDEX].tolist(), cameras.tolist(), strict=True):
        similar = [float(feat @ proxy) / 0.07 for proxy in proxies]
        own = [s for s, (a, c) in zip(similar, pairs, strict=True) if a == label and (positives == "all" or c != place)]
        others = sorted((s for s, (a, _) in zip(similar, pairs, strict=True) if a != label), reverse=True)[:2]
        total = torch.tensor(own + others, dtype=torch.float64).logsumexp(0)
        costs.append(sum(float(total) - s for s in own) / len(own) if own else 0.0)
    of_camera = [[cost for cost, own in zip(costs, cameras, strict=True) if own == name] for name in cameras.unique()]
    means = [sum(values) / len(values) for values in of_camera]
    found = model(batch())
    assert set(found) == {"loss_class", "loss_instance", "loss_camera", "accuracy", "partners"}
    assert found["loss_camera"].item() == pytest.approx(0.7 * sum(means), rel=1e-5)


@pytest.mark.parametrize("only", [-1, 0])
def test_camera_contrast_needs_cameras(only):
    model = build(camera.ACFLCamera)
    pseudo = PseudoLabels(LABELS, torch.zeros(3, 8))
    with pytest.raises(ValueError, match=r"known camera\(s\); two or more.*another MODEL\.NAME than ACFLCamera"):
        model.update_memory(pseudo, FeatureBank(model.memory.features, torch.full((len(LABELS),), only)))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"camera_weight": -0.5}, r"MODEL\.CAMERA_WEIGHT is -0\.5; 0 or more is accepted"),
        ({"camera_temperature": 0.0}, r"MODEL\.CAMERA_TEMPERATURE is 0\.0; a number above 0"),
        ({"camera_negatives": 0}, r"MODEL\.CAMERA_NEGATIVES is 0; 1 or more"),
        ({"camera_positives": "own"}, r"MODEL\.CAMERA_POSITIVES: 'own' is unknown; accepted: all, other"),
        ({"camera_axis": "rows"}, r"MODEL\.CAMERA_AXIS: 'rows' is unknown; accepted: cosine, coordinates"),
    ],
)
def test_wrong_values_of_the_camera_contrast(keys, message):
    with pytest.raises(ValueError, match=message):
        build(camera.ACFLCamera, **keys)


def test_figure_3_has_a_config_for_each_number_of_steps():
    steps = {load_config(file).MODEL.FEATURE_STEPS for file in CONFIGS.glob("ablations/feature_steps_*.yaml")}
    assert steps | {load_config(CONFIGS / "market.yaml").MODEL.FEATURE_STEPS} == {2, 4, 6, 8, 10, 12, 14}


def with_other_teacher(**keys) -> student.ACFLStudent:
    model = build(student.ACFLStudent, **keys)
    with torch.no_grad():
        for parameter in model.pretrained_teacher.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return model


def test_distance_to_the_teacher():
    model = with_other_teacher(pretrained_weight=0.3)
    images = batch().views[0]
    before = {name: value.clone() for name, value in model.pretrained_teacher.state_dict().items()}
    wanted = features(model, images, model.pretrained_teacher)
    expected = 0.3 * (features(model, images) - wanted).pow(2).sum(1).mean()
    outputs = model(batch())
    torch.testing.assert_close(outputs["loss_pretrained"], expected)
    sum(value for name, value in outputs.items() if name.startswith("loss")).backward()
    assert all(parameter.grad is None for parameter in model.pretrained_teacher.parameters())
    for name, value in model.pretrained_teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_guided_epoch_has_the_labels_and_the_memory_of_the_teacher():
    model = with_other_teacher()
    images = (255 * batch().views[0]).byte()
    model.eval()
    with torch.no_grad():
        own, taught = model.encoder(images).feats, model.pretrained_teacher(images).feats
        assert torch.equal(model.extract(images)["feats"], own)
        model.begin_epoch(guided=True)
        assert torch.equal(model.extract(images)["feats"], taught)
        bank = FeatureBank(taught, torch.zeros(8))
        model.update_memory(PseudoLabels(LABELS[INDEX], torch.zeros(3, 8)), bank)
        assert torch.equal(model.extract(images)["feats"], own)  # what evaluation sees
    data = batch()._replace(index=torch.arange(8))
    model.train()(data)
    assert torch.equal(model.memory.features, taught)
    model.begin_epoch(guided=False)
    with torch.no_grad():
        assert torch.equal(model.eval().extract(images)["feats"], model.encoder(images).feats)
    model.train()(data)
    assert not torch.equal(model.memory.features, taught)


@pytest.fixture
def recipe(tiny) -> list[str]:
    values = {
        "PLUGINS": ["fastreid_uns.projects.ACFL"],
        "MODEL.NAME": "ACFL",
        "MODEL.MEMORY": {"NAME": "ReplacedMemory"},
        "MODEL.LOSSES.contrast": None,
        "MODEL.BACKBONE.WIDTH": 8,
        "MODEL.IMAGE_STEPS": 1,
        "PSEUDO_LABELS.K1": 8,
        "PSEUDO_LABELS.K2": 3,
        "PSEUDO_LABELS.MIN_SAMPLES": 2,
    }
    return [*tiny, *(f"{key}={json.dumps(value)}" for key, value in values.items())]


def run(*overrides: str, resume: bool = False, hooks: tuple[HookBase, ...] = ()) -> DefaultTrainer:
    trainer = DefaultTrainer(load_config(overrides=overrides))
    for hook in hooks:
        trainer.add_hook(hook)
    if resume:
        trainer.resume()
    trainer.train()
    return trainer


class Memories(HookBase):
    """Notes the rows of the memory before and after the steps of each epoch."""

    order = 80

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def before_epoch(self) -> None:
        self.before = self.trainer.model.memory.features.clone()

    def after_epoch(self) -> None:
        self.seen.append((self.before, self.trainer.model.memory.features.clone()))


def test_two_stages(recipe, tmp_path):
    teacher = run(*recipe, f"OUTPUT_DIR={tmp_path / 'teacher'}")
    stage = [
        *recipe,
        "MODEL.NAME=ACFLStudent",
        "SOLVER.EPOCHS=4",
        "HOOKS.pretrained_teacher.NAME=PretrainedTeacherHook",
        "HOOKS.pretrained_teacher.EPOCHS=2",
    ]
    stage += [f"HOOKS.pretrained_teacher.WEIGHTS={tmp_path / 'teacher'}"]
    notes = Memories()
    learner = run(*stage, f"OUTPUT_DIR={tmp_path / 'student'}", hooks=(notes,))
    for name, value in learner.model.pretrained_teacher.state_dict().items():
        assert torch.equal(value, teacher.model.encoder.state_dict()[name]), name
    rows = [(before, torch.equal(before, after)) for before, after in notes.seen]
    assert [still for _, still in rows] == [True, True, False, False]
    assert torch.equal(rows[0][0], rows[1][0])
    assert not torch.equal(rows[1][0], rows[2][0])
    torch.testing.assert_close(rows[0][0].norm(dim=1), torch.ones(96))

    killed = [*stage, f"OUTPUT_DIR={tmp_path / 'parts'}"]
    for count in (1, 3):  # in a guided epoch and after one
        run(*killed, f"SOLVER.EPOCHS={count}", resume=count > 1)
    (tmp_path / "teacher").rename(tmp_path / "gone")  # a resumed run needs no teacher
    resumed = run(*killed, resume=True)
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, learner.model.state_dict()[name]), name


def test_a_teacher_that_is_not_there(recipe, tmp_path):
    stage = [*recipe, "MODEL.NAME=ACFLStudent", "HOOKS.pretrained_teacher.NAME=PretrainedTeacherHook"]
    with pytest.raises(
        FileNotFoundError, match=r"HOOKS\.pretrained_teacher\.WEIGHTS: .*teacher is neither a run nor.*Train the first"
    ):
        run(*stage, f"HOOKS.pretrained_teacher.WEIGHTS={tmp_path / 'teacher'}")


def test_a_teacher_that_nobody_named_is_told(recipe, caplog, monkeypatch):
    monkeypatch.setattr("logging.Logger.propagate", True, raising=False)
    run(*recipe, "MODEL.NAME=ACFLStudent", "HOOKS.pretrained_teacher.NAME=PretrainedTeacherHook", "SOLVER.EPOCHS=1")
    assert "HOOKS.pretrained_teacher.WEIGHTS is empty, so the pretrained teacher is no trained network" in caplog.text


def test_a_teacher_of_another_head(recipe, tmp_path):
    run(*recipe, "SOLVER.EPOCHS=1", "SOLVER.ITERS_PER_EPOCH=1", f"OUTPUT_DIR={tmp_path / 'teacher'}")
    stage = [
        *recipe,
        "MODEL.NAME=ACFLStudent",
        "HOOKS.pretrained_teacher.NAME=PretrainedTeacherHook",
        "MODEL.HEAD.POOLING=gem",
    ]
    with pytest.raises(ValueError, match=r"1 tensors of the teacher are not in it, the first is head\.pool\.p"):
        run(*stage, f"HOOKS.pretrained_teacher.WEIGHTS={tmp_path / 'teacher'}")


def test_a_teacher_without_a_student(recipe):
    with pytest.raises(
        ValueError, match=r"MODEL\.NAME is ACFL; a model with a pretrained teacher is needed. Set it to ACFLStudent"
    ):
        run(*recipe, "HOOKS.pretrained_teacher.NAME=PretrainedTeacherHook")


def test_negative_epochs_of_the_teacher():
    with pytest.raises(ValueError, match="PretrainedTeacherHook: EPOCHS is -1"):
        student.PretrainedTeacherHook(epochs=-1)


@pytest.fixture(scope="module")
def transformer():
    small = [
        "MODEL.WEIGHTS=''",
        "MODEL.BACKBONE.DEPTH=1",
        "MODEL.BACKBONE.WIDTH=48",
        "INPUT.SIZE=[64, 32]",
        "MODEL.GHOST_BATCH=0",
    ]
    cfg = load_config(CONFIGS / "market_vit.yaml", small)
    model = build_model(cfg, len(LABELS))
    feats = F.normalize(torch.randn(len(LABELS), 96, generator=torch.Generator().manual_seed(1)))
    model.update_memory(PseudoLabels(LABELS, torch.zeros(3, 96)), FeatureBank(feats, torch.zeros(len(LABELS))))
    return model.train()


def test_hard_images_for_a_transformer(transformer):
    outputs = transformer(batch(size=(64, 32)))
    sum(value for name, value in outputs.items() if name.startswith("loss")).backward()
    assert all(torch.isfinite(p.grad).all() for p in transformer.parameters() if p.requires_grad)
    assert transformer.encoder.dim == 96  # class token and mean of the part tokens, side by side


def test_images_of_another_size_than_the_transformer_was_built_for(transformer):
    message = r"the images have 64x64 pixels, the model was built for 64x32\. Resize the images, or set INPUT\.SIZE"
    with pytest.raises(ValueError, match=message):
        transformer(batch(size=(64, 64)))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("[8, 8]", r"images of 8x8 pixels are smaller than PATCH 16\. Raise INPUT\.SIZE"),
        ("[255, 128]", r"images of 255x128 pixels.*Set INPUT\.SIZE to such as 256 x 128"),
        ("[65, 32]", r"images of 65x32 pixels.*Set INPUT\.SIZE to such as 64 x 32"),
    ],
)
def test_sizes_that_a_transformer_with_a_stem_cannot_take(size, message):
    stem = ["MODEL.WEIGHTS=''", "MODEL.BACKBONE.CONV_STEM=true"]
    cfg = load_config(CONFIGS / "market_vit.yaml", [*stem, f"INPUT.SIZE={size}"])
    with pytest.raises(ValueError, match=message):
        build_model(cfg, 10)


VARIANTS = [*sorted(CONFIGS.glob("*_*.yaml")), *sorted(CONFIGS.glob("ablations/*.yaml"))]


@pytest.mark.parametrize("path", VARIANTS, ids=lambda path: path.stem)
def test_every_variant_has_the_memory_of_the_method(path):
    cfg = load_config(path)
    assert cfg.MODEL.MEMORY.NAME == "ReplacedMemory"
    assert not cfg.MODEL.LOSSES
    assert cfg.OUTPUT_DIR.split("/")[-1] == path.stem
