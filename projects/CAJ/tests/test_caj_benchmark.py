"""The benchmark measures both distances on the same images."""

from __future__ import annotations

from fastreid_uns.projects.CAJ import benchmark


def test_a_line_for_each_distance(capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "WARM_UP", 60)
    benchmark.main(["--images", "80", "--dim", "8", "--cameras", "3", "--runs", "2"])
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("80 x 8, 3 cameras, ")
    assert [line.split(":")[0] for line in lines] == ["jaccard_distance", "camera_jaccard_distance"]


def test_images_of_a_camera_are_nearer_to_each_other():
    feats, cameras = benchmark.make_bank(400, 32, 4)
    similarity, same = feats @ feats.T, cameras[:, None] == cameras
    assert similarity[same].mean() > similarity[~same].mean() + 0.02
