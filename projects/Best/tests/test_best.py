"""The ladder: each step changes what its name says and nothing else, and the README shows what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastreid_uns.commands import compare
from fastreid_uns.config import load_config
from fastreid_uns.experiments.study import read_studies
from fastreid_uns.experiments.tables import report

FOLDER = Path(__file__).parents[1]
STEPS = FOLDER / "configs/ablations"
SETS = ("synthetic", "omniglot", "market", "msmt")

# what each step may change: keys, and sections that end in a full stop
CHANGES = {
    "camera_labels": ("PSEUDO_LABELS.DISTANCE", "PSEUDO_LABELS.K1_IN", "PSEUDO_LABELS.K2_", "PSEUDO_LABELS.EPS"),
    "momentum_encoder": ("MODEL.NAME", "MODEL.MOMENTUM_ENCODER", "MODEL.ENCODER_MOMENTUM", "MODEL.UNNORMALIZED_"),
    "camera_proxies": ("MODEL.LOSSES.camera.",),
    "online_proxies": ("MODEL.LOSSES.online.",),
    "more_positives": ("MODEL.LOSSES.positives.",),
    "sparse_pairs": ("MODEL.LOSSES.sparse.",),
    "self_paced_labels": tuple(f"PSEUDO_LABELS.{key}" for key in ("NAME", "GAP", "SHARE", "INDEPEND", "COMPACT")),
    "correlation": ("MODEL.LOSSES.correlation.", "INPUT.VIEWS"),
    "hard_pairs": ("MODEL.LOSSES.hard.",),
    "soft_pairs": ("MODEL.LOSSES.soft.", "INPUT.VIEWS", "INPUT.AUGMENTS.weak."),
    "ibn": ("MODEL.BACKBONE.",),
}


def steps(name: str) -> list[Path]:
    """The configs of a set in their order."""
    return sorted(STEPS.glob(f"{name}_*.yaml"), key=lambda file: int(file.stem.split("_")[1]))


def leaves(file: Path) -> dict[str, Any]:
    """The values of a config by key, all but the folder of its runs."""
    found: dict[str, Any] = {}
    sections: list[tuple[str, dict]] = [("", load_config(file))]
    while sections:
        path, section = sections.pop()
        for key, value in section.items():
            if isinstance(value, dict):
                sections.append((f"{path}{key}.", value))
            elif key != "OUTPUT_DIR":
                found[path + key] = value
    return found


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    none = object()  # equal to no value
    return {key for key in before.keys() | after.keys() if before.get(key, none) != after.get(key, none)}


@pytest.mark.parametrize("name", SETS)
def test_each_step_adds_one_thing_to_the_one_before(name):
    files = steps(name)
    added = [file.stem.split("_", 2)[2] for file in files]
    assert added == ["core", *CHANGES][: 12 if name in ("market", "msmt") else 11]
    for before, after, step in zip(files, files[1:], added[1:], strict=False):
        keys = changed(leaves(before), leaves(after))
        assert keys
        assert not [key for key in keys if not key.startswith(CHANGES[step])], step


@pytest.mark.parametrize("name", ["synthetic", "market", "msmt"])
def test_the_sum_is_the_last_step(name):
    assert leaves(FOLDER / f"configs/{name}.yaml") == leaves(steps(name)[-1])


def test_the_parts_on_any_base_are_those_of_the_last_step(tmp_path):
    whole = tmp_path / "whole.yaml"
    whole.write_text(f"_BASE_: [{FOLDER.parents[1] / 'configs/base.yaml'}, {FOLDER / 'configs/method.yaml'}]")
    theirs, ours = leaves(steps("market")[-2]), leaves(whole)
    for section in ("MODEL.", "INPUT.VIEWS", "PSEUDO_LABELS.DISTANCE"):
        keys = [key for key in theirs if key.startswith(section)]
        assert {key: ours.get(key) for key in keys} == {key: theirs[key] for key in keys}


def test_the_first_step_is_the_core_with_the_best_settings_of_its_trials():
    """Of those in the records of the study of Omniglot."""
    records = [json.loads(line) for line in (FOLDER.parent / "studies.jsonl").read_text().splitlines()]
    trials = [r for r in records if (r["study"], r["row"]) == ("omniglot_from_random", "core") and r["hold_out"]]
    best = max(trials, key=lambda record: record["results"]["omniglot"]["mAP"])
    chosen = load_config(FOLDER.parents[1] / best["config"], best["overrides"])
    cfg = load_config(steps("omniglot")[0])
    assert cfg.MODEL.MEMORY == chosen.MODEL.MEMORY
    assert cfg.PSEUDO_LABELS == chosen.PSEUDO_LABELS
    assert cfg.SOLVER.BASE_LR == chosen.SOLVER.BASE_LR


def test_the_ladders_run_all_steps_from_the_core_on():
    for study in read_studies(FOLDER / "ladder.yaml"):
        jobs = [study.measured(row, ())[0] for row in study.rows]
        name = Path(jobs[0].config).stem.split("_")[0]
        assert [compare.ROOT / job.config for job in jobs[1:]] == steps(name)
        for job in jobs:
            load_config(compare.ROOT / job.config, job.overrides)


def test_the_readme_shows_the_committed_results():
    records = [json.loads(line) for line in (FOLDER / "ladder.jsonl").read_text().splitlines()]
    shown = (FOLDER / "README.md").read_text().partition(compare.BEGIN)[2].partition(compare.END)[0]
    assert shown.strip() == report(records, "Best")
