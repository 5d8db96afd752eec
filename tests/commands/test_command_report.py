from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from fastreid_uns.commands import report
from fastreid_uns.commands.pictures import BORDER, GAP, GREEN, GREY, PALETTE, RED, TITLE, Cell, Row, write_png
from fastreid_uns.config import load_config
from fastreid_uns.evaluation.retrieval import QueryScores, Ranker, distance_blocks
from fastreid_uns.modeling.meta_arch import build_model
from fastreid_uns.structures import Record, ReIDData


def test_choose_queries_by_average_precision():
    precision = torch.tensor([0.5, torch.nan, 0.1, 0.9, 0.3])
    chosen = report.choose_queries(QueryScores(precision, precision, precision.long()), 2)
    assert chosen["best"] == [3, 0]
    assert chosen["worst"] == [2, 4]
    assert len(chosen["random"]) == 2
    assert set(chosen["random"]) <= {0, 2, 3, 4}
    assert chosen == report.choose_queries(QueryScores(precision, precision, precision.long()), 2)
    assert report.choose_queries(QueryScores(precision, precision, precision.long()), 9)["random"] == [0, 2, 3, 4]


def test_rank_lists_are_those_of_the_score():
    random = np.random.default_rng(0)
    records = [Record(f"{i}.jpg", int(random.integers(5)), int(random.integers(3))) for i in range(60)]
    data = ReIDData([], records[:12], records[12:], "cross_camera")
    feats = normalize(torch.randn(60, 6, generator=torch.Generator().manual_seed(0)))
    query, gallery = feats[:12], feats[12:]
    ranker = Ranker.of(data)
    scores = ranker.score(distance_blocks(query, gallery))
    by_path = {record.path: record for record in records}
    for q, row in enumerate(report.rank_rows(data, ranker, scores, query, gallery, range(12), 48)):
        assert row.lead
        assert row.cells[0].path == f"{q}.jpg"
        hits = []
        for rank, cell in enumerate(row.cells[1:], start=1):
            record, own = by_path[cell.path], records[q]
            assert (record.identity, record.camera) != (own.identity, own.camera)
            assert cell.colour == (GREEN if record.identity == own.identity else RED)
            if cell.colour == GREEN:
                hits.append(rank)
        precision = np.mean([n / rank for n, rank in enumerate(hits, start=1)])
        assert precision == pytest.approx(scores.average_precision[q].item())
        assert f"AP {100 * precision:.1f} %, first match at rank {hits[0]} (nearest first)" in row.title


def test_cluster_rows_by_hand():
    labels = torch.tensor([1, 0, 1, -1, 1, 0, 2, 2, 1])
    identities = [7, 3, 7, 3, 8, -1, 5, 6, 7]
    cameras = [0, 0, 1, 0, 2, 1, -1, -1, 2]
    records = [Record(f"{i}.jpg", *pair) for i, pair in enumerate(zip(identities, cameras, strict=True))]
    rows = report.cluster_rows(labels, records, count=9, members=3)
    assert [row.title for row in rows] == [
        "cluster 1: 4 images from 3 cameras, 75 % of one identity",
        "cluster 0: 2 images from 2 cameras, 100 % of one identity",
        "cluster 2: 2 images, 50 % of one identity",
        "outliers: 1 in no cluster",
    ]
    assert [(cell.path, cell.colour) for cell in rows[0].cells] == [
        ("0.jpg", GREEN),
        ("2.jpg", GREEN),
        ("8.jpg", GREEN),
    ]
    assert [cell.colour for cell in rows[1].cells] == [GREEN, GREY]
    assert [cell.colour for cell in rows[2].cells] == list(PALETTE[:2])
    assert [row.title.split(":")[0] for row in report.cluster_rows(labels, records, count=2)[:2]] == [
        "cluster 1",
        "cluster 2",
    ]


def test_the_sheet_holds_each_image_in_its_border(tmp_path):
    Image.new("RGB", (9, 9), (10, 20, 200)).save(tmp_path / "blue.png")
    (tmp_path / "broken.png").write_text("no picture")
    cells = [Cell(str(tmp_path / "blue.png"), RED), Cell(str(tmp_path / "broken.png"), GREEN)]
    write_png([Row("a title that is longer than its two pictures are wide", cells)], tmp_path / "sheet.png", (20, 10))
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.width > 2 * (10 + 2 * BORDER + GAP) + GAP  # room for the title
    top = GAP + TITLE
    assert sheet.getpixel((GAP, top)) == (0xD6, 0x28, 0x28)
    assert sheet.getpixel((GAP + BORDER + 5, top + BORDER + 10)) == (10, 20, 200)
    second = GAP + 10 + 2 * BORDER + GAP
    assert sheet.getpixel((second, top)) == (0x2A, 0x9D, 0x3F)
    assert sheet.getpixel((second + BORDER + 5, top + BORDER + 10)) == (0x9A, 0x9A, 0x9A)


def test_curves_take_what_there_is(tmp_path):
    pytest.importorskip("matplotlib")
    assert not report.draw_curves([{"epoch": 0, "iter": 5}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    lines = [{"epoch": 0, "clusters": 5}, {"epoch": 1, "clusters": 7, "market/mAP": 3.0, "largest_cluster": 4}]
    assert report.draw_curves(lines, tmp_path / "some.png")
    assert Image.open(tmp_path / "some.png").width > 300


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Output folder of a run on 30 pictures: 12 to train, 6 queries, 12 in the gallery."""
    place = tmp_path_factory.mktemp("run")
    random = np.random.default_rng(0)
    lines = ["path,identity,camera,split"]
    for i, split in enumerate(["train"] * 12 + ["query"] * 6 + ["gallery"] * 12):
        colour = random.integers(0, 256, 3, dtype=np.uint8)
        Image.new("RGB", (8, 16), tuple(colour.tolist())).save(place / f"{i}.png")
        lines.append(f"{i}.png,{i % 3},{int(split == 'query')},{split}")
    (place / "list.csv").write_text("\n".join(lines))
    data = f"{{NAME: csv_file, PATH: {place / 'list.csv'}}}"
    keys = ["INPUT.SIZE=[16, 8]", "MODEL.BACKBONE.NAME=SmallNet", "MODEL.BACKBONE.WIDTH=8", "DATALOADER.WORKERS=0"]
    cfg = load_config(None, [*keys, f"DATASETS.TRAIN={data}", f"DATASETS.TESTS={{mine: {data}}}"])
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, -1, 2, 2, 2, -1])
    content = {
        "model": build_model(cfg, 12).state_dict(),
        "config": cfg.dump(),
        "num_images": 12,
        "epochs_done": 2,
        "hooks": {"ReclusterHook": {"labels": labels}},
    }
    torch.save(content, place / "checkpoint_0002.pth")
    (place / "last").write_text("checkpoint_0002.pth\n")
    metrics = [{"epoch": 0, "clusters": 4, "outliers": 1}, {"epoch": 1, "clusters": 3, "outliers": 2, "mAP": 50.0}]
    (place / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in metrics))
    return place


def test_a_report_of_a_run(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    arguments = [run, "--output", tmp_path, "--queries", 2, "--top", 3, "--device", "cpu", "TEST.BATCH_SIZE", 7]
    assert report.main([*map(str, arguments)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "index.html")
    pictures = {"curves", "ranks_best", "ranks_worst", "ranks_random", "clusters", "map"}
    assert {file.stem for file in tmp_path.glob("*.png")} == pictures
    page = (tmp_path / "index.html").read_text()
    for text in (
        "2 epochs",
        "best queries, highest AP first",
        "left out, as in the score",
        "cluster 1: 4 images",
        "mAP",
    ):
        assert text in page
    assert page.count("data:image/jpeg") == 3 * 2 * 4 + 10 + 2  # queries with three results; clustered and outliers
    assert page.count("data:image/png") == 2  # curves and map
    assert "http" not in page  # nothing is fetched


def test_parts_and_errors(run, tmp_path, capsys):
    def fails(*arguments):
        assert report.main([*map(str, arguments), "--output", str(tmp_path), "--device", "cpu"]) == 2
        printed = capsys.readouterr().err
        assert printed.count("\n") == 1
        return printed

    assert report.main([str(run), "--output", str(tmp_path / "some"), "--parts", "clusters"]) == 0
    assert [file.name for file in (tmp_path / "some").glob("*.png")] == ["clusters.png"]
    capsys.readouterr()
    assert "--test other is none of DATASETS.TESTS: mine" in fails(run, "--parts", "ranks", "--test", "other")
    assert "did you mean SIZE?" in fails(run, "INPUT.SIZ", "[4, 4]", "--parts", "clusters")
    assert "key 'INPUT.SIZE' has no value" in fails(run, "INPUT.SIZE", "--parts", "clusters")
    assert "no checkpoint was found" in fails(tmp_path, "--parts", "clusters")
    shorter = run / "shorter.csv"
    shorter.write_text((run / "list.csv").read_text().replace("\n0.png,0,0,train", ""))
    message = fails(run, "DATASETS.TRAIN.PATH", shorter, "--parts", "clusters")
    assert "the run clustered 12 images, DATASETS.TRAIN now has 11" in message


def test_without_matplotlib(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.main([str(run), "--output", str(tmp_path)]) == 2
    assert "matplotlib is not installed" in capsys.readouterr().err
    arguments = [str(run), "--output", str(tmp_path), "--parts", "ranks", "clusters", "--device", "cpu"]
    assert report.main(arguments) == 0


def test_help_loads_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-m", "fastreid_uns.commands", "report", "--help"], capture_output=True, text=True
    )
    assert "gallery images of a query (default: 10)" in done.stdout
    code = "import sys, fastreid_uns.commands.report; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
