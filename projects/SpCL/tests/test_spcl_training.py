"""The whole method on the generated set, without labels and with a labelled source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastreid_uns.config import load_config
from fastreid_uns.data.build import domains_of_tests
from fastreid_uns.engine.default import DefaultTrainer
from fastreid_uns.engine.recluster import ReclusterHook
from fastreid_uns.modeling.meta_arch import build_model
from fastreid_uns.modeling.norm import DomainBatchNorm

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = [
    "PSEUDO_LABELS.K1=8",
    "PSEUDO_LABELS.K2=3",
    "PSEUDO_LABELS.MIN_SAMPLES=2",
    "MODEL.BACKBONE.WIDTH=8",
    "INPUT.AUGMENTS.train={FLIP: 0.5, PAD: 2, ERASE: 0.0}",
]


@pytest.fixture
def recipe(tiny, tiny_set, request) -> list[str]:
    """Overrides of the config that the test names."""
    if request.param == "synthetic":
        return [*tiny, *SMALL]
    source = {"DATASETS.SOURCES.drawn": {**tiny_set, "SEED": 5, "TRAIN_IDENTITIES": 10}}
    source |= {"DATALOADER.SOURCE_SAMPLER.BATCH_SIZE": 16, "DATALOADER.SOURCE_SAMPLER.NUM_INSTANCES": 4}
    return [*tiny, *SMALL, *(f"{key}={json.dumps(value)}" for key, value in source.items())]


def both(function):
    return pytest.mark.parametrize(
        ("name", "recipe"), [("synthetic", "synthetic"), ("synthetic_uda", "synthetic_uda")], indirect=["recipe"]
    )(function)


def trainer_of(name: str, overrides: list[str]) -> DefaultTrainer:
    return DefaultTrainer(load_config(CONFIGS / f"{name}.yaml", overrides))


def flat(state, prefix="") -> dict[str, torch.Tensor]:
    """All tensors and numbers of a nested state."""
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in flat(value, f"{prefix}{key}/").items()}
    if isinstance(state, (list, tuple)):
        return {k: v for i, value in enumerate(state) for k, v in flat(value, f"{prefix}{i}/").items()}
    return {prefix: torch.as_tensor(state)} if isinstance(state, (torch.Tensor, int, float)) else {}


@both
def test_the_memory_is_what_is_clustered(name, recipe):
    trainer = trainer_of(name, [*recipe, "SOLVER.EPOCHS=1"])
    assert trainer.model.memory_bank() is None
    trainer.train()
    rows = trainer.model.memory_bank()
    assert rows.shape == (96, trainer.model.encoder.dim)
    sources = 10 if name == "synthetic_uda" else 0
    assert int(trainer.model.memory.num_source) == sources
    assert len(trainer.model.memory.features) == sources + 96
    hook = trainer.hook(ReclusterHook)
    bank = hook._bank()
    assert torch.equal(bank.feats, rows)
    assert bank.source_feats is None
    labels = hook.pseudo.labels
    assert labels.min() == 0  # every image is in some cluster, if only its own
    # 32 images were seen, and moved their rows; the others are as they were extracted
    fresh = trainer_of(name, [*recipe, "SOLVER.EPOCHS=1"])
    fresh._call("before_epoch")
    moved = (fresh.model.memory_bank() != rows).any(1)
    assert 0 < int(moved.sum()) <= 2 * 16
    assert (fresh.model.memory.features[:sources] != trainer.model.memory.features[:sources]).any() == bool(sources)


@both
def test_resume_equals_an_uninterrupted_run_bit_for_bit(name, recipe, tmp_path):
    recipe = [*recipe, "SOLVER.ITERS_PER_EPOCH=4", "SOLVER.EPOCHS=3"]
    straight = trainer_of(name, [*recipe, f"OUTPUT_DIR={tmp_path / 'straight'}"])
    straight.train()
    killed = trainer_of(name, [*recipe, f"OUTPUT_DIR={tmp_path / 'parts'}"])
    killed.hook(ReclusterHook).before_epoch = stop_at(killed, 2)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    torch.rand(5)
    resumed = trainer_of(name, [*recipe, f"OUTPUT_DIR={tmp_path / 'parts'}"])
    resumed.resume()
    assert resumed.epochs_done == 2
    resumed.train()
    one, two = flat(resumed.state_dict()), flat(straight.state_dict())
    assert one.keys() == two.keys()
    assert any("generator/bound" in key for key in one)
    assert [key for key in one if not torch.equal(one[key], two[key])] == []


def stop_at(trainer: DefaultTrainer, epoch: int):
    """The moment before clustering, which ends the process in the given epoch."""
    cluster = trainer.hook(ReclusterHook).before_epoch

    def before_epoch():
        if trainer.epoch == epoch:
            raise KeyboardInterrupt
        cluster()

    return before_epoch


@pytest.mark.parametrize("recipe", ["synthetic_uda"], indirect=True)
def test_a_joint_batch_is_counted_as_the_memory_is(recipe):
    trainer = trainer_of("synthetic_uda", recipe)
    trainer._call("before_epoch")
    batch = next(trainer.train_loader.epoch(0))
    assert batch.domains.tolist() == [1] * 16 + [0] * 16
    model = trainer.model.train()
    assert sum(isinstance(module, DomainBatchNorm) for module in model.modules()) > 0
    rows = model.memory.rows(batch)
    assert model.memory.row_labels[rows].tolist() == batch.labels.tolist()
    assert rows[:16].max() < 10 <= rows[16:].min()
    with torch.autocast("cpu", torch.bfloat16):
        inputs = model.loss_inputs(batch)
    assert inputs["logits"].dtype == torch.float32
    clusters = trainer.hook(ReclusterHook).pseudo.num_clusters
    assert inputs["logits"].shape == (32, 10 + clusters)
    assert inputs["labels"].tolist() == batch.labels.tolist()


@pytest.mark.parametrize("recipe", ["synthetic_uda"], indirect=True)
def test_a_source_is_measured_with_its_own_norm_layers(recipe):
    file = CONFIGS / "synthetic_uda.yaml"
    source = next(iter(load_config(file).DATASETS.SOURCES))
    cfg = load_config(file, [*recipe, f"TEST.DOMAINS.synthetic={source}"])
    model = build_model(cfg, 8)
    for module in model.modules():
        if isinstance(module, DomainBatchNorm):
            torch.nn.init.constant_(module.domains[0].running_var, 1e6)  # those of the target know nothing
    by_source = DefaultTrainer.test(cfg, model)["synthetic"]
    by_target = DefaultTrainer.test(load_config(file, recipe), model)["synthetic"]
    assert by_source != by_target
    for module in model.modules():
        if isinstance(module, DomainBatchNorm):
            torch.nn.init.constant_(module.domains[0].running_var, 1.0)  # now both are as they were made
    assert DefaultTrainer.test(load_config(file, recipe), model)["synthetic"] == by_source


@pytest.mark.parametrize("entry", ["synthetic=nothing", "nothing=drawn"])
def test_a_domain_that_is_not_there_is_refused(entry):
    cfg = load_config(CONFIGS / "synthetic_uda.yaml", [f"TEST.DOMAINS.{entry}"])
    with pytest.raises(ValueError, match=r"TEST\.DOMAINS: (synthetic|nothing): .*Correct it"):
        domains_of_tests(cfg)


@pytest.mark.parametrize("recipe", ["synthetic"], indirect=True)
def test_a_momentum_encoder_counts_by_labels_too(recipe):
    trainer = trainer_of("synthetic", [*recipe, "MODEL.MOMENTUM_ENCODER=true"])
    trainer._call("before_epoch")
    inputs = trainer.model.train().loss_inputs(next(trainer.train_loader.epoch(0)))
    assert inputs["teacher_logits"].shape == inputs["logits"].shape
    assert inputs["logits"].shape[1] == trainer.hook(ReclusterHook).pseudo.num_clusters


@pytest.mark.parametrize("task", ["market_msmt", "vehicleid_veri", "synthetic_uda"])
def test_a_task_of_adaptation_without_its_source_is_refused(task):
    file = CONFIGS / f"{task}.yaml"
    source = next(iter(load_config(file).DATASETS.SOURCES))
    cfg = load_config(file, [f"DATASETS.SOURCES.{source}=null"])
    for build in (
        lambda cfg: DefaultTrainer.build_train_set(cfg, torch.device("cpu")),
        lambda cfg: build_model(cfg, 8),
    ):  # before images and weights are read
        with pytest.raises(ValueError, match=r"MODEL\.DOMAIN_BN is true but DATASETS\.SOURCES names no set.*Name one"):
            build(cfg)


@pytest.mark.parametrize(("memory", "found"), [("{NAME: ClusterMemory}", "ClusterMemory"), ("null", "none")])
def test_another_memory_is_refused(memory, found):
    cfg = load_config(CONFIGS / "synthetic.yaml", [f"MODEL.MEMORY={memory}"])
    with pytest.raises(ValueError, match=rf"MODEL\.MEMORY\.NAME: SpCLModel got {found}; .* needs HybridMemory"):
        build_model(cfg, 8)
