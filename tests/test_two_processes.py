"""Two gloo processes: equal weights, memory and labels; the numbers of one process."""

import json

import pytest
import torch

from fastreid_uns.utils import checkpoint


@pytest.fixture
def recipe(tiny) -> list[str]:
    return [
        *tiny,
        "PSEUDO_LABELS.K1=8",
        "PSEUDO_LABELS.K2=3",
        "PSEUDO_LABELS.MIN_SAMPLES=2",
        "MODEL.BACKBONE.WIDTH=8",
        "MODEL.GHOST_BATCH=8",
        "MODEL.LOSSES.triplet.NAME=SoftTripletLoss",
        "SOLVER.OPTIMIZER=SGD",
        "SOLVER.BASE_LR=0.001",
        "SOLVER.ITERS_PER_EPOCH=3",
    ]


def test_two_processes_agree_with_each_other_and_with_one(recipe, launch, tmp_path):
    one, two = launch(2, tmp_path / "two", recipe)
    assert one["model"].keys() == two["model"].keys()
    assert [k for k in one["model"] if not torch.equal(one["model"][k], two["model"][k])] == []
    assert torch.equal(one["labels"], two["labels"])
    assert one["results"] == two["results"]

    (single,) = launch(1, tmp_path / "one", recipe)
    assert torch.equal(single["labels"], one["labels"])
    for name, value in single["model"].items():
        torch.testing.assert_close(
            one["model"][name], value, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name} {m}"
        )
    for metric, value in single["results"]["synthetic"].items():
        assert one["results"]["synthetic"][metric] == pytest.approx(value, abs=0.2)

    first = checkpoint.load_checkpoint(checkpoint.last_checkpoint(tmp_path / "two" / "run"))
    assert len(first["random"]) == 2
    assert len((tmp_path / "two" / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "two" / "run" / "metrics.jsonl").read_text().splitlines()[0])["clusters"] > 1


@pytest.mark.slow
def test_two_processes_with_batches_in_parts_give_the_weights_and_the_memory_of_one_with_whole_batches(
    recipe, launch, tmp_path
):
    """Norm groups that divide a part, no loss that compares images of a batch; running statistics see more batches."""
    alike = [key for key in recipe if "triplet" not in key and "GHOST_BATCH" not in key]
    alike += ["MODEL.GHOST_BATCH=4", "SOLVER.EPOCHS=1"]
    one, two = launch(2, tmp_path / "two", [*alike, "SOLVER.ACCUMULATE=2"])
    (single,) = launch(1, tmp_path / "one", alike)
    assert [k for k in one["model"] if not torch.equal(one["model"][k], two["model"][k])] == []
    for name, value in single["model"].items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(
                one["model"][name], value, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name} {m}"
            )
