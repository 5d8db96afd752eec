from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fastreid_uns.evaluation.extract import _filled, evaluation_mode, extract_features, share
from fastreid_uns.utils.precision import full_precision

sys.path.insert(0, str(Path(__file__).parent))
from evaluation_stubs import Images, Model, reid_task


def test_rows_in_order_of_the_set_whatever_the_batch():
    _, images = reid_task()
    model = Model().train()
    model.norm.eval()  # a frozen layer, which must not come back in training mode
    found = extract_features(model, images, batch_size=5)
    assert images.asked == [list(range(i, min(i + 5, 32))) for i in range(0, 32, 5)]
    assert [module.training for module in (model, model.conv, model.norm, model.drop)] == [True, True, False, True]
    model.eval()
    with torch.no_grad():
        single = [model.extract(images.pixels[i : i + 1]) for i in range(32)]
    assert set(found) == {"feats", "parts", "brightest"}
    for name, value in found.items():
        torch.testing.assert_close(value, torch.cat([row[name] for row in single]))
        assert not value.requires_grad
    (found["feats"].requires_grad_() ** 2).sum().backward()  # no inference tensor: a memory may take it up


def test_a_gpu_sees_batches_of_one_size(device):
    """The last of 32 images in batches of 5 come with black ones, of which nothing is kept."""
    images = reid_task()[1]
    model, sizes = Model().to(device), []
    model.conv.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    with full_precision(device):
        found = extract_features(model, images, batch_size=5)
    assert sizes == [5] * 6 + ([5] if device.type == "cuda" else [2])
    model.eval()
    with torch.no_grad(), full_precision(device):
        single = [model.extract(images.pixels[i : i + 1].to(device))["feats"] for i in range(32)]
    torch.testing.assert_close(found["feats"], torch.cat(single), rtol=1e-3, atol=1e-4)


def test_a_short_batch_is_filled_with_black():
    pixels = torch.randint(1, 256, (2, 3, 4, 5), dtype=torch.uint8)
    filled = _filled(pixels, 5)
    assert filled.dtype == torch.uint8
    assert torch.equal(filled[:2], pixels)
    assert filled.shape == (5, 3, 4, 5)
    assert not filled[2:].any()
    assert _filled(pixels, 2) is _filled(pixels, 0) is pixels


def test_mode_is_restored_after_an_error():
    model = Model().train()

    def broken(images):
        assert not model.training
        assert not torch.is_grad_enabled()
        raise KeyError("broken")

    model.extract = broken
    with pytest.raises(KeyError, match="broken"):
        extract_features(model, reid_task()[1])
    assert model.training
    assert model.norm.training
    assert torch.is_grad_enabled()


def test_autocast_computes_in_half_and_gives_float32():
    images = reid_task()[1]
    model = Model()
    seen = []
    model.conv.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    found = extract_features(model, images, amp=torch.bfloat16)
    assert set(seen) == {torch.bfloat16}
    assert found["feats"].dtype == found["parts"].dtype == torch.float32
    assert found["brightest"].dtype == torch.int64
    torch.testing.assert_close(found["feats"], extract_features(model, images)["feats"], atol=0.03, rtol=0)


def test_features_that_are_not_finite_name_the_first_image():
    images = reid_task()[1]
    model = Model()
    good = model.extract

    def extract(pixels):
        out = good(pixels)
        out["feats"][3] = torch.nan
        return out

    model.extract = extract
    with pytest.raises(RuntimeError, match=r"epoch 3: 4 of 32 images have features that are not finite.*image_3\.jpg"):
        extract_features(model, images, batch_size=8, what="epoch 3")


def test_an_empty_set_is_refused():
    with pytest.raises(ValueError, match="the image set is empty"):
        extract_features(Model(), Images(torch.zeros(0, 3, 8, 6)))


def test_evaluation_mode_leaves_an_evaluating_model_alone():
    model = Model().eval()
    with evaluation_mode(model):
        assert not model.training
    assert not model.training


@pytest.mark.parametrize(("count", "world"), [(7, 3), (1, 2), (0, 2), (4, 4), (3, 5)])
def test_shares_are_disjoint_complete_and_begin_with_rank_0(monkeypatch, count, world):
    shares = []
    for rank in range(world):
        monkeypatch.setattr("fastreid_uns.evaluation.extract.rank", lambda rank=rank: rank)
        monkeypatch.setattr("fastreid_uns.evaluation.extract.world", lambda: world)
        shares.append(share(list(range(count))))
    assert [item for part in shares for item in part] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert shares[0] or not count
