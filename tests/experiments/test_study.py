"""What a study runs: the settings that are tried, the choice among them, and the seeds of each row."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from fastreid_uns.commands.compare import ROOT
from fastreid_uns.config import load_config
from fastreid_uns.errors import InvalidValue, UnknownName, UserError
from fastreid_uns.experiments import study as study_module
from fastreid_uns.experiments.agenda import Listed, Studied, current, unmeasured
from fastreid_uns.experiments.runs import Job
from fastreid_uns.experiments.study import Row, Study, Tuning, drawn, raised, read_studies, step_number

FILE = ROOT / "projects/studies.yaml"
ROWS = (
    Row("untrained", "configs/a.yaml", "untrained", {}),
    Row("core", "configs/a.yaml", "unsupervised", {"A": [1, 2]}),
)


def study(name: str = "zoo", tuned_on: str = "zoo") -> Study:
    how = Tuning(tuned_on, (f"SET={tuned_on}",), 3, 7, 0.25, {"A": [0, 1, 2, 4, 8], "B": [1, 2]})
    return Study(name, ROWS, (f"SET={name}",), (1, 2), how)


def ended(job: Job, score: float) -> dict:
    return {**job._asdict(), "results": {"zoo": {"mAP": score}}}


def all_of(agenda: Studied) -> list[Job]:
    return list(iter(agenda.following, None))


def test_each_value_is_tried_equally_often():
    settings = drawn({"A": [1, 2, 3], "B": [True, False]}, 7, seed=0)
    assert settings[0] == ()
    counts = Counter(text for setting in settings[1:] for text in setting)
    assert counts == {"A=1": 2, "A=2": 2, "A=3": 2, "B=true": 3, "B=false": 3}


def test_rows_that_share_a_key_try_the_same_values_of_it():
    one, other = drawn({"A": [1, 2, 3]}, 6, seed=5), drawn({"B": [4, 5], "A": [1, 2, 3]}, 6, seed=5)
    assert [setting[0] for setting in one[1:]] == [setting[1] for setting in other[1:]]


def test_a_row_is_measured_with_the_best_setting_on_validation_identities():
    agenda = Studied([study()], [])
    trials = [job for job in all_of(agenda) if job.hold_out]
    assert [(job.seed, job.overrides[:1]) for job in trials] == [(7, ("SET=zoo",))] * 3
    for job, score in zip(trials, (10.0, 30.0, 20.0), strict=True):
        assert all_of(agenda) == []  # nothing new while one is missing
        agenda.add(ended(job, score))
    best = trials[1].overrides
    assert all_of(agenda) == [Job("configs/a.yaml", "unsupervised", seed, best, 0.0, "zoo", "core") for seed in (1, 2)]


def test_what_needs_no_tuning_is_measured_at_once():
    first = [job for job in all_of(Studied([study()], [])) if not job.hold_out]
    assert [(job.row, job.seed) for job in first] == [("untrained", 1), ("untrained", 2)]


def test_further_settings_raise_the_best_one_while_it_pays():
    row = replace(ROWS[1], further=4)
    one = replace(study(), rows=(row,))
    agenda = Studied([one], [])
    scores = {"A=1": 10.0, "A=2": 20.0, "A=4": 30.0, "A=8": 25.0}  # of A; the row has no B
    trials = [job for job in all_of(agenda) if job.hold_out]
    tried = []
    while trials:
        for job in trials:
            tried.append(job.overrides[1:])
            agenda.add(ended(job, scores[tried[-1][0]] if tried[-1] else 5.0))
        trials = [job for job in all_of(agenda) if job.hold_out]
    # further ones: 2 to 4; 4 to 8, which is worse; 4 to 8 again, twice, which costs no run
    assert [*sorted(tried[:3]), *tried[3:]] == [(), ("A=1",), ("A=2",), ("A=4",), ("A=8",)]
    assert [job.overrides for job in agenda.seeds(one, row)] == [("SET=zoo", "A=4")] * 2


@pytest.mark.parametrize(
    ("setting", "expected"),
    [(("A=1", "B=3"), ("A=2", "B=3")), (("A=1.5",), ("A=2",)), (("A=2",), None)],
)
def test_a_value_is_raised_to_the_next_one(setting, expected):
    assert raised(setting, "A", [1, 2]) == expected


def test_own_settings_that_are_the_best_are_raised_from_the_value_of_the_config():
    (grocery,) = read_studies(ROOT / "projects/studies.yaml", ["grocery_from_imagenet"])
    (ascl,) = [row for row in grocery.rows if row.name == "ASCL"]
    trials = grocery.trials(ascl, lambda setting: 1.0 if setting else 2.0)
    # the study sets BASE_LR 0.0001, the config of the project EPS 0.5; each is raised, then again, which costs no run
    assert trials[-2:] == [("SOLVER.BASE_LR=0.0003",), ("PSEUDO_LABELS.EPS=0.6",)]
    assert trials[:-2] == grocery.trials(ascl, lambda setting: None)


def test_a_row_is_measured_before_the_next_one_is_tuned():
    rows = (ROWS[0], ROWS[1], Row("supervised", "configs/a.yaml", "supervised", {"A": [1, 2]}))
    one = replace(study(), rows=rows)
    trials = [job for job in all_of(Studied([one], [])) if job.row == "core"]
    agenda = Studied([one], [ended(job, 1.0) for job in trials])
    assert [(job.row, bool(job.hold_out)) for job in all_of(agenda)] == [
        *[("untrained", False)] * 2,
        *[("core", False)] * 2,
        *[("supervised", True)] * 3,
    ]


def test_runs_with_a_setting_that_is_no_longer_the_best_do_not_count():
    one = study()
    trials = [one.trial(ROWS[1], setting) for setting in drawn(ROWS[1].grid, 3, 7)]
    records = [ended(job, score) for job, score in zip(trials, (1.0, 3.0, 2.0), strict=True)]
    new, old = (one.measured(ROWS[1], trials[i].overrides[1:]) for i in (1, 2))
    records += [ended(job, 9.0) for job in (*old, new[0])]
    agenda = Studied([one], records)
    assert current(agenda, records) == [*records[:3], records[-1]]
    assert unmeasured(agenda, one) == ["untrained", "core"]
    agenda.add(ended(new[1], 9.0))
    assert unmeasured(agenda, one) == ["untrained"]


def test_a_failed_trial_is_the_worst_and_is_not_repeated():
    agenda = Studied([study()], [])
    trials = [job for job in all_of(agenda) if job.hold_out]
    records = [{**trials[0]._asdict(), "error": "no clusters"}, ended(trials[1], 0.5), ended(trials[2], 0.25)]
    new = Studied([study()], records)
    assert {job.overrides for job in all_of(new) if job.row == "core"} == {trials[1].overrides}


def test_a_row_that_always_fails_is_not_measured():
    trials = [job for job in all_of(Studied([study()], [])) if job.hold_out]
    agenda = Studied([study()], [{**job._asdict(), "error": "no clusters"} for job in trials])
    assert {job.row for job in all_of(agenda)} == {"untrained"}


def test_a_lost_run_is_tried_again_by_the_next_call_only():
    agenda = Listed([Job("a", "untrained", 1)], [])
    job = agenda.following()
    agenda.add({**job._asdict(), "error": "its process has ended", "lost": True})
    assert agenda.following() is None
    assert Listed([job], []).following() == job


def test_settings_can_be_those_of_another_study():
    agenda = Studied([study("sea", tuned_on="zoo")], [])
    trials = [job for job in all_of(agenda) if job.hold_out]
    assert {(job.study, job.overrides[0]) for job in trials} == {("zoo", "SET=zoo")}
    for job, score in zip(trials, (1.0, 2.0, 3.0), strict=True):
        agenda.add(ended(job, score))
    measured = all_of(agenda)
    assert {(job.study, job.overrides) for job in measured} == {("sea", ("SET=sea", *trials[2].overrides[1:]))}


def test_finished_runs_are_not_done_again():
    records = [ended(Job("configs/a.yaml", "untrained", 1, ("SET=zoo",), 0.0, "zoo", "untrained"), 4.0)]
    assert [job.seed for job in all_of(Studied([study()], records)) if job.row == "untrained"] == [2]


def test_every_project_is_in_the_shipped_studies_with_its_baseline_and_the_same_budget():
    for one in read_studies(FILE):
        config = Path(one.rows[0].config).name  # a project that reads cameras has none for a set without them
        projects = {path.parents[1].name for path in ROOT.glob(f"projects/*/configs/{config}")}
        projects -= {"PASS", "PCLCLIP", "TransReIDSSL"}  # WITHOUT
        expected = {"untrained", "core", "supervised", *projects, *(f"{name} baseline" for name in projects)}
        assert {row.name for row in one.rows} == expected, one.name
        assert projects
        tried = {len(one.trials(row, lambda setting: None)) for row in one.rows if row.kind != "untrained"}
        assert tried == {one.tuning.trials}


@pytest.mark.parametrize("name", ["omniglot_from_random", "grocery_from_imagenet", "cattely_from_imagenet"])
def test_the_shipped_studies_name_keys_that_their_configs_have(name):
    (one,) = read_studies(FILE, [name])
    refused = []
    for row in one.rows:
        trials = [one.trial(row, setting) for setting in one.trials(row, lambda setting: None)]
        for job in trials[-1:] + one.measured(row, ())[:1]:
            try:
                load_config(ROOT / job.config, job.overrides)
            except UserError as error:
                refused.append(f"{row.name}: {error}")
    assert refused == []


def test_a_file_says_how_far_rows_go_on_what_the_test_part_changes_and_which_projects_come_first(tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "ROOT", tmp_path)
    for project in ("A", "B", "C", "Left"):
        (tmp_path / f"projects/{project}/configs").mkdir(parents=True)
        (tmp_path / f"projects/{project}/configs/sea.yaml").touch()
    file = tmp_path / "projects/studies.yaml"
    file.write_text(
        "{SEEDS: [1], TRIAL_SEED: 7, HOLD_OUT: 0.5, FIRST: [C, Absent], WITHOUT: [Left], ROWS: {}, STUDIES: {zoo: "
        "{CONFIG: sea, TRIALS: 2, OVERRIDES: {AMP: none}, MEASURED: {AMP: auto}, GRID: {RATE: [1]}, "
        "FURTHER: 3}}}"
    )
    (one,) = read_studies(file)
    assert [row.name for row in one.rows] == ["untrained", "core", "supervised", "C", "A", "B"]
    assert [row.further for row in one.rows] == [0, 3, 3, 3, 3, 3]
    core = one.rows[1]
    assert [one.trial(core, setting).overrides for setting in drawn(core.grid, 2, 7)] == [
        ("AMP=none",),
        ("AMP=none", "RATE=1"),
    ]
    assert one.measured(core, ("RATE=1",))[0].overrides == ("AMP=auto", "RATE=1")


def test_an_unknown_study_is_told_with_the_nearest_name():
    with pytest.raises(UnknownName, match="omniglot_from_random"):
        read_studies(FILE, ["omniglot_from_randon"])


@pytest.fixture
def ladder(tmp_path, monkeypatch):
    """A function that reads a ladder of empty configs with the given names."""
    monkeypatch.setattr(study_module, "ROOT", tmp_path)

    def read(*names: str) -> Study:
        for name in names:
            (tmp_path / f"{name}.yaml").touch()
        (tmp_path / "ladder.yaml").write_text("{SEEDS: [1, 2], STUDIES: {up: {STEPS: zoo, OVERRIDES: {SIZE: [8, 8]}}}}")
        (one,) = read_studies(tmp_path / "ladder.yaml")
        return one

    return read


def test_the_steps_of_a_ladder_are_measured_in_order_and_none_is_tuned(ladder):
    steps = {
        f"zoo_{i}_{word}": f"{i} {word.replace('_', ' ')}" for i, word in enumerate(["core", *"bcdefghi", "j_k"], 1)
    }
    jobs = all_of(Studied([ladder(*steps, "sea_1_core", "zoo")], []))
    expected = [("untrained", "zoo_1_core.yaml"), *((row, f"{file}.yaml") for file, row in steps.items())]
    assert [(job.row, job.config) for job in jobs if job.seed == 1] == expected
    assert [job.seed for job in jobs] == [1] * 11 + [2] * 11
    assert {(job.study, job.overrides, job.hold_out) for job in jobs} == {("up", ("SIZE=[8, 8]",), 0.0)}


@pytest.mark.parametrize(
    ("names", "found"), [([], "not"), (["zoo_1_core", "zoo_3_b"], "1, 3"), (["zoo_1_a", "zoo_1_b"], "1, 1")]
)
def test_a_ladder_with_a_gap_is_refused(ladder, names, found):
    with pytest.raises(InvalidValue, match=rf"zoo_\*\.yaml are numbered {found}; 1, 2, 3 and so on"):
        ladder(*names)


def test_rows_that_are_no_steps_have_no_number():
    assert [step_number(row) for row in ("12 camera labels", "core", "ICE baseline", "")] == [12, 0, 0, 0]
