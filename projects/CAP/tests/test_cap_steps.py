"""Two steps of the official code: proxies, losses, gradients and moved proxies, by the parts of the config."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastreid_uns.config import load_config
from fastreid_uns.modeling.losses import LossSet
from fastreid_uns.projects.CAP.model import CAPModel
from fastreid_uns.registry import LOSS_REGISTRY, MEMORY_REGISTRY
from fastreid_uns.structures import Batch, FeatureBank, HeadOutput, Moment, PseudoLabels

HERE = Path(__file__).parent
GOLDEN = sorted((HERE / "golden").glob("cap_*.npz"))
METHOD = HERE.parent / "configs/method.yaml"
EPOCHS = {"intra": 0, "both": 5}  # the inter-camera loss begins at epoch 5
Case = dict[str, torch.Tensor]


class Given(nn.Module):
    """An encoder whose images are features before unit length already."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, images: torch.Tensor, domains: torch.Tensor) -> HeadOutput:
        feats = F.normalize(images)
        if feats.requires_grad:
            feats.retain_grad()
        self.feats = feats
        return HeadOutput(images, feats, unnormalized=images)


def load(path: Path) -> Case:
    found = {key: torch.from_numpy(np.asarray(value)) for key, value in np.load(path).items()}
    return {key: value.float() if value.is_floating_point() else value.long() for key, value in found.items()}


def build(case: Case) -> CAPModel:
    """The model of `method.yaml` with the proxies of a case."""
    section = load_config(METHOD, [f"MODEL.LOSSES.inter.NEGATIVES={int(case['par_negatives'])}"]).MODEL
    losses = {name: (LOSS_REGISTRY.build(loss), loss.WEIGHT) for name, loss in section.LOSSES.items()}
    starts = {name: loss.START_EPOCH for name, loss in section.LOSSES.items()}
    dim = case["in_features"].shape[1]
    memory = MEMORY_REGISTRY.build(section.MEMORY, dim)
    model = CAPModel(Given(dim), memory, LossSet(losses, starts), len(case["in_labels"])).train()
    labels = case["in_labels"]
    pseudo = PseudoLabels(labels, torch.zeros(int(labels.max()) + 1, dim))
    model.update_memory(pseudo, FeatureBank(case["in_features"], case["in_cameras"]))
    return model


def batch_of(case: Case, step: int) -> Batch:
    """The images of a step, which are features that want a gradient."""
    index = case[f"in_index_step{step}"]
    raw = case[f"in_raw_step{step}"].clone().requires_grad_()
    return Batch((raw,), index, case["in_labels"][index], case["in_cameras"][index], torch.zeros_like(index))


def same_order(model: CAPModel, case: Case) -> torch.Tensor:
    """Row of the official code for each row of the memory."""
    official = {
        pair: row
        for row, pair in enumerate(
            zip(case["out_proxy_label"].tolist(), case["out_proxy_camera"].tolist(), strict=True)
        )
    }
    pairs = zip(model.memory.labels.tolist(), model.memory.cameras.tolist(), strict=True)
    return torch.tensor([official[pair] for pair in pairs])


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_proxies_of_the_official_code(path):
    case = load(path)
    model = build(case)
    order = same_order(model, case)
    assert sorted(order.tolist()) == list(range(len(case["out_proxies"])))
    torch.testing.assert_close(model.memory.features, case["out_proxies"][order], rtol=0, atol=1e-6)


@pytest.mark.parametrize("term", EPOCHS)
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_two_steps_of_the_official_code(path, term):
    """`cap_03_fewneg` has fewer foreign proxies than negatives, which the official code counts twice: see below."""
    case = load(path)
    model = build(case)
    model.moment = Moment(epoch=EPOCHS[term])
    order = same_order(model, case)
    clean = "var_loss_inter_clean_step1" not in case or term == "intra"
    for step in (1, 2):
        batch = batch_of(case, step)
        outputs = model(batch)
        assert ("loss_inter" in outputs) == (term == "both")
        total = sum(value for name, value in outputs.items() if name.startswith("loss"))
        expected = case[f"out_loss_{term}_step{step}"]
        if not clean:
            expected = case[f"out_loss_intra_step{step}"] + case[f"var_loss_inter_clean_step{step}"]
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=5e-6)
        total.backward()
        if clean:
            for found, key in ((batch.views[0].grad, "raw"), (model.encoder.feats.grad, "unit")):
                official = case[f"out_grad_{key}_{term}_step{step}"]
                torch.testing.assert_close(found, official, rtol=0, atol=3e-6 + 1e-5 * float(official.abs().max()))
        moved = case[f"out_proxies_{term}_after_step{step}"][order]
        torch.testing.assert_close(model.memory.features, moved, rtol=0, atol=1e-6)


def test_what_the_official_code_does_where_negatives_run_out():
    """Its value is ours with every positive twice in the denominator."""
    case = load(HERE / "golden/cap_03_fewneg.npz")
    model = build(case)
    batch = batch_of(case, 1)
    logits = (F.normalize(batch.views[0].detach()) @ model.memory.features.T / 0.07).double()
    inter: dict[int, list[float]] = {}
    for image, (label, camera) in enumerate(zip(batch.labels.tolist(), batch.cameras.tolist(), strict=True)):
        positive = model.memory.labels == label
        twice = torch.cat([logits[image], logits[image][positive]])
        inter.setdefault(camera, []).append(float(twice.logsumexp(0) - logits[image][positive].mean()))
    expected = float(case["out_loss_intra_step1"]) + 0.5 * sum(np.mean(losses) for losses in inter.values())
    assert float(case["out_loss_both_step1"]) == pytest.approx(expected, rel=1e-5)
