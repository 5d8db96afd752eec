"""Tables of studies: rows, chosen settings, effects, published figures, three formats."""

import csv
import io

import pytest

from fastreid_uns.commands.compare import ROOT
from fastreid_uns.experiments import tables
from fastreid_uns.experiments.figures import published_figures


def record(row: str, seed: int, score: float, *chosen: str, hold_out: float = 0.0, **more) -> dict:
    core = row in ("untrained", "core", "supervised")
    kind = row if row in ("untrained", "supervised") else "unsupervised"
    config = "configs/zoo.yaml" if core else f"projects/{row.split()[0]}/configs/zoo.yaml"
    about = {"config": config, "kind": kind, "seed": seed, "overrides": ["SIZE=8", *chosen], "hold_out": hold_out}
    results = {"zoo": {"mAP": score, "rank1": 2 * score}}
    place = {"device": "Abacus", "torch": "2.0", "commit": "abc"}
    return {**about, "study": "zoo", "row": row, "results": results, "seconds": 4.0, "environment": place, **more}


SCORES = {"untrained": (1.0, 2.0), "core": (10.0, 12.0), "supervised": (20.0, 23.0), "P": (14.0, 15.0)}
SCORES |= {"P baseline": (11.0, 13.0), "Q": (5.0, 6.0)}
CHOSEN = {"core": ("SOLVER.BASE_LR=0.1", "A.EPS=0.5"), "P": ("SOLVER.BASE_LR=0.2", "MODEL.LOSSES.pair.T=1")}
RECORDS = [
    record(row, seed, score, *CHOSEN.get(row, ()))
    for row, scores in SCORES.items()
    for seed, score in enumerate(scores, 1)
]


def test_rows_of_a_study_with_their_settings():
    table = tables.study_table(RECORDS)
    assert table.headers[:6] == ["zoo", "seeds", "mAP", "rank-1", "seconds", "chosen settings"]
    assert [row[0] for row in table.rows] == ["untrained", "core", "P", "P baseline", "Q", "supervised"]
    # 10 and 12: mean 11, deviation sqrt(2); rank-1 is twice that
    assert table.rows[1][:6] == ["core", "2", "11.00 ± 1.41", "22.00 ± 2.83", "4", "BASE_LR 0.1, EPS 0.5"]
    assert table.rows[0][5] == "own"
    assert table.rows[2][5] == "BASE_LR 0.2, pair.T 1"


def test_effects_are_paired_by_seed_and_adjusted_for_all_of_them():
    (table,) = tables.effect_tables(RECORDS)
    # P: 3 and 2; core over the start: 9 and 10; true labels over the core: 10 and 11; standard error 0.5 each
    assert [row[:3] for row in table.rows] == [
        ["P - baseline", "2", "+2.50"],
        ["core - untrained", "2", "+9.50"],
        ["supervised - core", "2", "+10.50"],
    ]
    # one degree of freedom: P(|T| > t) = 1 - 2/pi atan(t); t = 5, 19, 21 gives 0.1257, 0.0335, 0.0303; x 1, 2, 3
    assert [row[4] for row in table.rows] == ["0.126", "0.091", "0.091"]
    assert {row[5] for row in table.rows} == {"not shown"}
    assert table.rows[0][3] == "-3.85 to +8.85"  # 2.5 -+ 12.706 x 0.5


def test_a_row_that_lacks_a_seed_is_named_and_not_compared():
    shorter = [r for r in RECORDS if (r["row"], r["seed"]) != ("P baseline", 2)]
    (table,) = tables.effect_tables(shorter)
    assert [row[0] for row in table.rows] == ["core - untrained", "supervised - core"]
    assert tables.study_table(shorter).rows[3][:3] == ["P baseline", "1", "11.00"]
    missing = {"zoo": ["P", "R"], "sea": []}
    assert tables.report(shorter, missing=missing).endswith("\n\nzoo: not measured with all seeds yet: P, R.")
    assert tables.report(shorter, "P", missing).endswith("\n\nzoo: not measured with all seeds yet: P.")
    assert tables.report(shorter, "Q", missing) == tables.report(shorter, "Q")


def test_a_tiny_probability_is_not_printed_as_zero():
    far = [
        record(row, seed, score + seed / 1000) for row, score in (("untrained", 0), ("core", 50)) for seed in range(9)
    ]
    far[0]["results"]["zoo"]["mAP"] += 0.001  # the differences are not all equal
    (table,) = tables.effect_tables(far)
    assert table.rows[0][4] == "< 0.001"


def test_validation_runs_are_in_a_table_of_their_own_and_failed_ones_in_none():
    failed = {key: value for key, value in record("P", 7, 0.0, hold_out=0.25).items() if key != "results"}
    trials = [record("P", 9, 40.0, hold_out=0.25), record("P", 9, 99.0, "A.EPS=0.5", hold_out=0.25)]
    trials += [record("core", 9, 30.0, "A.EPS=0.5", hold_out=0.25)]
    trials[0]["environment"] = {"device": "Slate", "torch": "1.0", "commit": "def"}
    more = [*RECORDS, *trials, {**failed, "error": "no clusters"}]
    *others, table = tables.tables(more)
    assert others == tables.tables(RECORDS)
    assert [*table.rows] == [["core", "1", "", "30.0", "EPS 0.5"], ["P", "2", "40.0", "99.0", "EPS 0.5"]]
    assert [row[0] for row in tables.trial_table(trials, "Q").rows] == ["core"]
    said = tables.provenance(more)
    assert "; Abacus, torch 2.0; commit abc; `SIZE=8`. 3 runs on validation" in said
    assert said.endswith("(Abacus, torch 2.0; Slate, torch 1.0; commit def, abc).")


def test_a_project_sees_its_rows_and_those_of_the_core():
    scores, effects = tables.tables(RECORDS, "P")
    assert [row[0] for row in scores.rows] == ["untrained", "core", "P", "P baseline", "supervised"]
    assert [row[0] for row in effects.rows] == ["P - baseline", "core - untrained"]
    assert effects.rows[0][4] == "0.126"  # as among all


def test_a_project_sees_no_study_that_it_has_no_row_in():
    elsewhere = [record("core", 1, 10.0, study="farm"), record("Q", 1, 9.0, study="farm")]
    loose = [record("core", 1, 8.0, study="")]
    assert tables.report([*RECORDS, *elsewhere, *loose], "P") == tables.report([*RECORDS, *loose], "P")
    assert "farm" in tables.report([*RECORDS, *elsewhere], "Q")


LADDER = [
    record(row, seed, score)
    for row, scores in {"10 c": (9.0, 12.0), "2 b": (5.0, 6.0), "1 a": (4.0, 6.0), "untrained": (1.0, 2.0)}.items()
    for seed, score in enumerate(scores, 1)
]


def test_steps_of_a_ladder_are_compared_with_the_one_before_and_the_last_one_with_the_first():
    scores, effects = tables.tables(LADDER, "P")
    assert scores.headers == ["zoo", "seeds", "mAP", "rank-1", "seconds"]
    assert [row[0] for row in scores.rows] == ["untrained", "1 a", "2 b", "10 c"]
    # differences 1 and 0; 4 and 6; 5 and 6
    expected = [["2 b - 1 a", "2", "+0.50"], ["10 c - 2 b", "2", "+5.00"], ["10 c - 1 a", "2", "+5.50"]]
    assert [row[:3] for row in effects.rows] == expected
    # one degree of freedom: P(|T| > t) = 1 - 2/pi atan(t); t = 1, 5, 11 gives 0.5, 0.1257, 0.0577; x 1, 2, 3
    assert [row[4] for row in effects.rows] == ["0.500", "0.251", "0.173"]


def test_two_steps_are_compared_once():
    (effects,) = tables.effect_tables([r for r in LADDER if r["row"] != "10 c"])
    assert [row[0] for row in effects.rows] == ["2 b - 1 a"]


def test_three_formats_hold_the_same_cells(tmp_path):
    tables.write_tables(tmp_path, RECORDS)
    parts = (tmp_path / "tables.csv").read_text().split("\n\n")
    scores, effects = ([*csv.reader(io.StringIO(part))] for part in parts)
    assert scores[2][:3] == ["core", "2", "11.00 ± 1.41"]
    assert effects[1][:3] == ["P - baseline", "2", "+2.50"]
    latex = (tmp_path / "tables.tex").read_text()
    assert latex.count(r"\begin{tabular}") == latex.count(r"\bottomrule") == 2
    assert "11.00 ± 1.41" in latex
    assert "| core " in (tmp_path / "tables.md").read_text()


def test_published_figures_are_beside_measured_ones():
    config = "projects/ICL/configs/market.yaml"
    loose = {
        **record("ICL", 1, 80.0),
        "study": "",
        "config": config,
        "results": {"market1501": {"mAP": 80, "rank1": 90}},
    }
    (table,) = tables.tables([loose])
    assert table.headers[-1] == "published mAP / rank-1"
    assert table.rows[0][-1] == "84.5 / 94.5 (ICL Table II)"


def test_every_published_figure_names_a_config_that_is_there_and_is_a_percentage():
    figures = published_figures()
    assert figures
    for (config, _), figure in figures.items():
        assert (ROOT / config).is_file(), config
        assert all(0 <= float(value) <= 100 for value in (figure.mAP, figure.rank1) if value)
        assert figure.mAP


def test_the_readmes_agree_with_the_published_figures():
    for figure in published_figures().values():
        if figure.config.startswith("projects"):
            text = (ROOT / figure.config.partition("/configs/")[0] / "README.md").read_text()
            assert figure.mAP in text, figure
            assert figure.rank1 in text, figure


@pytest.mark.parametrize("project", ["", "P"])
def test_nothing_comparable_gives_no_table_of_effects(project):
    assert tables.effect_tables([record("Q", 1, 5.0)], project) == []
