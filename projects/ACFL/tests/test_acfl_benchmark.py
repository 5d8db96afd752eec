"""The recurrence is fast because it never makes the copies that it stands for."""

from __future__ import annotations

from fastreid_uns.projects.ACFL import benchmark


def test_recurrence_gives_the_same_logits_many_times_faster():
    found = benchmark.compare(batch=32, clusters=100, dim=512, repeats=2)
    assert found["difference"] < 1e-3
    assert found["ratio"] > 2


def test_one_line_with_the_ratio(capsys):
    benchmark.main(["--batch", "4", "--clusters", "6", "--dim", "8", "--repeats", "1"])
    line = capsys.readouterr().out
    assert line.startswith("4 queries, 6 centroids, 8 dimensions, cpu: explicit ")
    assert ", ratio " in line
