"""Thresholds by hand and by simulation, and what is said about queries."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastreid_uns.modeling.whitening import MainDirections, ViewWhitening
from fastreid_uns.photos.group import Settings, cluster, for_count
from fastreid_uns.photos.identify import Thresholds, _rarely_reached, fit_thresholds, identify, least_known
from fastreid_uns.photos.outcome import thresholds_of


def individuals(count: int, photos: int, noise: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    middle = F.normalize(torch.randn(count, 32, generator=draw)).repeat_interleave(photos, 0)
    feats = F.normalize(middle + noise * torch.randn(count * photos, 32, generator=draw))
    return feats, torch.arange(count).repeat_interleave(photos)


def test_thresholds_are_quantiles_of_scores_against_other_and_own_groups():
    feats, groups = individuals(30, 2, 0.1, 0)
    found = fit_thresholds(feats, groups, 30, false_known=0.1, false_new=0.1)
    others = [max(float(feats[i] @ feats[j]) for j in range(60) if groups[i] != groups[j]) for i in range(60)]
    own = [float(feats[i] @ feats[i ^ 1]) for i in range(60)]
    assert found.known == pytest.approx(sorted(others)[55], abs=1e-6)  # 1 / 31 + 4 / 62 are at most 0.1
    assert found.new == pytest.approx(min(sorted(own)[6], found.known), abs=1e-6)


def test_groups_of_one_do_not_count():
    feats, groups = individuals(30, 2, 0.1, 1)
    alone = F.normalize(torch.randn(5, 32, generator=torch.Generator().manual_seed(9)))
    more = torch.cat([feats, alone]), torch.cat([groups, torch.arange(30, 35)])
    assert fit_thresholds(*more, 30) == fit_thresholds(feats, groups, 30)


def test_too_few_scores_recognise_nobody():
    feats, groups = individuals(3, 2, 0.1, 0)
    assert fit_thresholds(feats, groups, 3).known == torch.inf
    assert fit_thresholds(torch.eye(4), torch.arange(4), 0) == Thresholds(torch.inf, -torch.inf)
    one = fit_thresholds(*individuals(1, 30, 0.1, 0), 1)
    assert one.known == torch.inf


def test_new_individuals_are_called_known_as_rarely_as_said():
    wrong, found, count = 0, 0, 0
    for seed in range(10):
        feats, groups = individuals(60, 4, 0.12, seed)
        known = groups < 40
        thresholds = fit_thresholds(feats[known], groups[known], 40, false_known=0.05)
        said = identify(feats[~known], feats[known], groups[known], thresholds, precision=0.9)
        wrong += sum(one.kind == "known" for one in said)
        count += len(said)
        held = torch.arange(len(groups)) % 4 == 0
        again = identify(feats[known & held], feats[known & ~held], groups[known & ~held], thresholds, precision=0.9)
        found += sum(one.kind == "known" and one.group == g for one, g in zip(again, groups[known & held], strict=True))
    assert wrong / count <= 0.08
    assert found / 400 > 0.5


def test_fewer_scores_may_be_reached_the_fewer_individuals_there_are():
    scores = torch.arange(100.0)[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    above = [(_rarely_reached(scores, individuals, 0.1) <= scores).sum() for individuals in (9, 12, 30, 90, 10**12)]
    assert above == [0, 2, 7, 9, 10]  # 100 * (0.1 - 0.9 / individuals)
    for few in (0, 1, 5):
        assert _rarely_reached(scores, few, 0.1) == pytest.approx(99, abs=1e-4)
        assert _rarely_reached(scores, few, 0.1) > 99
    assert _rarely_reached(scores[:19], 30, 0.1) == torch.inf


def test_the_promise_holds_for_individuals_whose_photos_are_all_alike():
    wrong, by_photos = [], []
    for seed in range(500):
        scores = torch.rand(15, generator=torch.Generator().manual_seed(seed)).repeat_interleave(20)
        wrong.append(1 - _rarely_reached(scores, 15, 0.2))  # how often a further number in 0..1 reaches it
        by_photos.append(1 - float(scores.quantile(0.8)))
    assert 0.1 < sum(wrong) / 500 <= 0.2
    assert sum(by_photos) / 500 > 0.22


def views_of_individuals(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three views of four photos of each individual, in 300 dimensions."""
    draw = torch.Generator().manual_seed(seed)
    middle = torch.randn(count, 1, 1, 300, generator=draw)
    photos = middle + 0.7 * torch.randn(count, 4, 1, 300, generator=draw)
    views = photos + 0.5 * torch.randn(count, 4, 3, 300, generator=draw)
    return views.flatten(0, 1), torch.arange(count).repeat_interleave(4)


def test_the_least_threshold_by_a_loop():
    views, groups = views_of_individuals(12, 0)
    views, groups = torch.cat([views, views[:2] + 1]), torch.cat([groups, torch.tensor([12, 13])])  # two photos alone
    order = torch.randperm(14, generator=torch.Generator().manual_seed(3)).tolist()
    scores = []
    for photo in range(48):
        tenth = order[groups[photo]] % 10
        seen = [other for other in range(50) if order[groups[other]] % 10 != tenth]
        whitening = ViewWhitening(300, 300).fit(MainDirections.of(views[seen], 300), groups[seen])
        feats = F.normalize(whitening(views.mean(1)))
        scores.append(max(float(feats[photo] @ feats[other]) for other in seen if other < 48))
    found = least_known(views, groups, 12, false_known=0.1, seed=3)
    assert found == pytest.approx(sorted(scores)[46], abs=1e-5)  # 1 / 13 + 1 / 52 are at most 0.1
    assert least_known(views[:16], groups[:16], 4) == torch.inf


def test_few_photos_are_pushed_apart_by_their_own_whitening_and_new_ones_are_not():
    naive, honest, count = 0, 0, 0
    for seed in range(2):
        views, groups = views_of_individuals(50, seed)
        known = groups < 25
        found = MainDirections.of(views[known], 192)
        whitening = ViewWhitening(300, 192).fit(found)
        feats = F.normalize(whitening(views.mean(1)))
        own = fit_thresholds(feats[known], groups[known], 25)
        scores = (feats[~known] @ feats[known].T).amax(1)
        naive += int((scores >= own.known).sum())
        honest += int((scores >= least_known(found.views, groups[known], 25)).sum())
        count += len(scores)
    assert naive / count > 0.9
    assert honest / count <= 0.05


def test_less_pure_groups_have_a_threshold_of_their_own():
    thresholds = Thresholds(known=0.6, new=0.2, doubtful=0.7)
    assert [thresholds.known_at(precision) for precision in (None, 0.79)] == [torch.inf, torch.inf]
    assert [thresholds.known_at(precision) for precision in (0.8, 0.89, 0.9, 1.0)] == [0.7, 0.7, 0.6, 0.6]
    assert Thresholds(known=0.6, new=0.2).known_at(0.85) == 0.6  # of an index that was made before


def test_stricter_groups_keep_the_promise_where_individuals_of_one_kind_share_a_group():
    """Two of each kind are known, in one group; the third is new."""
    by_known, by_doubtful = [], []
    for seed in range(4):
        draw = torch.Generator().manual_seed(seed)
        kinds = F.normalize(torch.randn(20, 64, generator=draw)).repeat_interleave(3, 0)
        middle = 0.85 * kinds + 0.53 * F.normalize(torch.randn(60, 64, generator=draw))
        feats = F.normalize(middle).repeat_interleave(6, 0) + 0.06 * torch.randn(360, 64, generator=draw)
        feats, old = F.normalize(feats), torch.arange(60).repeat_interleave(6) % 3 < 2
        grouping = cluster(feats[old], for_count(Settings(), 240))
        assert grouping.labels.max() < 20
        thresholds = thresholds_of(grouping)
        score = (feats[~old] @ feats[old].T).amax(1)
        by_known.append(float((score >= thresholds.known).float().mean()))
        by_doubtful.append(float((score >= thresholds.doubtful).float().mean()))
    assert sum(by_known) / 4 > 0.9
    assert sum(by_doubtful) / 4 <= 0.05


def test_what_is_said():
    feats = torch.eye(4)[[0, 0, 1, 1, 2]]
    groups = torch.tensor([1, 1, 2, 2, 3])
    queries = F.normalize(torch.tensor([[0.0, 1, 0.1, 0], [1, 0, 0, 1], [0, 0, 0, 1], [0, 0, 1, 0]]))
    thresholds = Thresholds(known=0.9, new=0.5)
    said = identify(queries, feats, groups, thresholds, precision=0.8)
    assert [(one.kind, one.group) for one in said[:2]] == [("known", 2), ("unsure", 1)]
    assert [one.kind for one in said[2:]] == ["new", "new"]  # the group of one is nobody yet
    assert said[1].similarity == pytest.approx(0.5**0.5)
    for precision in (None, 0.79):
        kinds = [one.kind for one in identify(queries, feats, groups, thresholds, precision=precision)]
        assert kinds == ["unsure", "unsure", "new", "new"]
    assert identify(queries[:1], feats[4:], groups[4:], thresholds, precision=1.0)[0] == ("unsure", -1, 0)
    with pytest.raises(ValueError, match="features have 3 numbers, those of the known photos 4"):
        identify(torch.ones(1, 3), feats, groups, thresholds, precision=1.0)
