"""A study: rows that get the same budget of tuning on validation identities and are then measured on the test part.

A study file is YAML: what all studies share, and under `STUDIES` what each of them is; see `projects/studies.yaml`. A
study with `STEPS` is a ladder: configs of which each adds one thing to the one before it, and of which none is tuned;
see `projects/Best/ladder.yaml`.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from fastreid_uns.config import load_config
from fastreid_uns.config.yaml_text import parse_yaml, read_text
from fastreid_uns.errors import InvalidValue, UnknownName
from fastreid_uns.experiments.runs import Job
from fastreid_uns.registry import did_you_mean

ROOT = Path(__file__).resolve().parents[2]  # of the checkout
CORE, UNTRAINED, SUPERVISED = "core", "untrained", "supervised"
BASELINE = " baseline"  # after the name of a project

Grid = Mapping[str, Sequence[Any]]
Setting = tuple[str, ...]  # `KEY=VALUE` of each key that is tuned; () = a row's own settings


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: `untrained`, `core`, `supervised`, a project, a project with ` baseline`, or a step of a ladder, such as
            `2 camera labels`.
        config: YAML file.
        kind: one of `runs.KINDS`.
        grid: the values of each key that is tuned; empty = nothing is.
        further: settings at most that are tried after those from the grid, see `Study.trials`.
    """

    name: str
    config: str
    kind: str
    grid: Grid
    further: int = 0


@dataclass(frozen=True)
class Tuning:
    """How settings are chosen.

    Attributes:
        study: whose runs these are.
        overrides: keys changed in all of them.
        trials: settings that are drawn for each row with a grid, its own settings included.
        seed: of the runs, and of the draw of the settings.
        hold_out: share of the training identities on which they are scored.
        higher: ascending values of the keys that the further settings raise, see `Study.trials`.
    """

    study: str
    overrides: tuple[str, ...]
    trials: int
    seed: int
    hold_out: float
    higher: Grid = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """One set and one start.

    Attributes:
        name: of the study.
        rows: what is compared.
        overrides: keys changed in every run.
        seeds: of the runs on the test part.
        tuning: how the settings of a row are chosen.
    """

    name: str
    rows: tuple[Row, ...]
    overrides: tuple[str, ...]
    seeds: tuple[int, ...]
    tuning: Tuning

    def trials(self, row: Row, score: Callable[[Setting], float | None]) -> list[Setting]:
        """The settings that a row tries: those drawn from its grid, then further ones beyond its ends.

        A further one raises one key of the best setting so far, or what the row's config has where the setting leaves
        it, to its next higher value; the keys take turns. So the best value is not one at the end of the grid, unless
        higher ones do not pay. A setting that has been tried costs no run.

        Args:
            row: with a grid; one without tries nothing.
            score: mAP of a setting on validation identities, None as long as it has none. The list then ends where
                the next setting depends on it.
        """
        how = self.tuning
        settings = drawn(row.grid, how.trials, how.seed) if row.grid else []
        higher = {key: values for key, values in how.higher.items() if key in row.grid}
        for key in itertools.islice(itertools.cycle(higher), row.further):
            scores = [score(setting) for setting in settings]
            known = [found for found in scores if found is not None]
            if len(known) < len(settings):
                break
            best = settings[known.index(max(known))]
            if not any(text.startswith(f"{key}=") for text in best):
                best = (*best, f"{key}={_typed(own_value(row.config, how.overrides, key))}")
            setting = raised(best, key, higher[key])
            if setting is not None and setting not in settings:
                settings.append(setting)
        return settings

    def trial(self, row: Row, setting: Setting) -> Job:
        """The run that scores a setting on validation identities."""
        how = self.tuning
        overrides = (*how.overrides, *setting)
        return Job(row.config, row.kind, how.seed, overrides, how.hold_out, how.study, row.name)

    def measured(self, row: Row, chosen: Setting) -> list[Job]:
        """The runs of a row on the test part."""
        overrides = (*self.overrides, *chosen)
        return [Job(row.config, row.kind, seed, overrides, 0.0, self.name, row.name) for seed in self.seeds]


def raised(setting: Setting, key: str, values: Sequence[float]) -> Setting | None:
    """A setting with the next higher value of a key.

    Args:
        setting: has the key.
        key: to raise.
        values: of the key, ascending.

    Returns:
        None if there is no higher value.
    """
    (i,) = [i for i, text in enumerate(setting) if text.startswith(f"{key}=")]
    higher = [value for value in values if value > float(setting[i].partition("=")[2])]
    return (*setting[:i], f"{key}={_typed(higher[0])}", *setting[i + 1 :]) if higher else None


@cache
def own_value(config: str, overrides: tuple[str, ...], key: str) -> Any:
    """What a config of the checkout has for a key, after what a study changes in it."""
    value: Any = load_config(ROOT / config, overrides)
    for name in key.split("."):
        value = value[name]
    return value


def drawn(grid: Grid, count: int, seed: int) -> list[Setting]:
    """Settings from a grid; the first one changes nothing.

    Each key takes its values equally often, in a random order of its own, which is the same wherever the key has as
    many values: rows that share a key are tried with the same values of it.

    Args:
        grid: values by key.
        count: settings, at least 1.
        seed: of the orders.
    """
    columns = []
    for key, values in grid.items():
        repeated = [values[i % len(values)] for i in range(count - 1)]
        random.Random(f"{seed} {key}").shuffle(repeated)
        columns.append([f"{key}={_typed(value)}" for value in repeated])
    return [(), *zip(*columns, strict=True)]


def _typed(value: Any) -> str:
    """As one types it on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def read_studies(file: Path, names: Sequence[str] = ()) -> list[Study]:
    """The studies of a file.

    Args:
        file: YAML, see `projects/studies.yaml`; configs are those of the checkout.
        names: of some of them; none = all.

    Raises:
        UnknownName: the file has no such study.
        InvalidValue: it is no file of studies.
    """
    content = parse_yaml(read_text(file), str(file))
    if not isinstance(content, dict) or not isinstance(content.get("STUDIES"), dict):
        raise InvalidValue(f"{file}: a map with STUDIES is expected. See projects/studies.yaml.")
    known = content["STUDIES"]
    for name in names:
        if name not in known:
            raise UnknownName(f"{file}: no study {name}{did_you_mean(name, known)} Present: {', '.join(known)}.")
    return [_ladder(name, content) if "STEPS" in known[name] else _study(name, content) for name in names or known]


def step_number(row: str) -> int:
    """The place of a row in its ladder, from 1; 0 for a row that is no step."""
    number = row.partition(" ")[0]
    return int(number) if number.isdecimal() else 0


def _ladder(name: str, content: Mapping[str, Any]) -> Study:
    """A study whose rows are the start and the files `STEPS_<number>_<what it adds>.yaml`."""
    own = content["STUDIES"][name]
    first = Path(own["STEPS"])
    steps = []
    for file in ROOT.glob(f"{first}_*.yaml"):
        words = file.stem.removeprefix(f"{first.name}_").replace("_", " ")
        steps.append(Row(words, str(file.relative_to(ROOT)), "unsupervised", {}))
    steps.sort(key=lambda row: step_number(row.name))
    numbers = [step_number(row.name) for row in steps]
    if not steps or numbers != [*range(1, 1 + len(steps))]:
        raise InvalidValue(
            f"{name}: the configs {first}_*.yaml are numbered {', '.join(map(str, numbers)) or 'not'}; 1, 2, 3 and so "
            f"on are accepted, one file for each. Rename them."
        )
    rows = (Row(UNTRAINED, steps[0].config, "untrained", {}), *steps)
    overrides = _overrides(own)
    return Study(name, rows, overrides, tuple(content["SEEDS"]), Tuning(name, overrides, 0, 0, 0.0))


def _study(name: str, content: Mapping[str, Any]) -> Study:
    own = content["STUDIES"][name]
    tuned_on = own.get("SETTINGS_OF", name)
    source = content["STUDIES"][tuned_on]
    how = Tuning(
        tuned_on,
        _overrides(source),
        source["TRIALS"],
        content["TRIAL_SEED"],
        content["HOLD_OUT"],
        source.get("HIGHER", {}),
    )
    rows = [Row(UNTRAINED, f"configs/{own['CONFIG']}.yaml", "untrained", {})]
    for row, config, kind in _trained(own["CONFIG"], content["FIRST"], content["WITHOUT"]):
        shared = {key: values for key, values in source["GRID"].items() if kind != "supervised" or "PSEUDO" not in key}
        grid = {**shared, **content["ROWS"].get(row, {})}
        grid = {key: values for key, values in grid.items() if values is not None}
        rows.append(Row(row, config, kind, grid, source.get("FURTHER", 0)))
    return Study(name, tuple(rows), _overrides(own, "MEASURED"), tuple(content["SEEDS"]), how)


def _overrides(study: Mapping[str, Any], more: str = "") -> tuple[str, ...]:
    """The keys that a study changes, and those of a further section if it has that one."""
    return tuple(f"{key}={_typed(value)}" for key, value in (study["OVERRIDES"] | study.get(more, {})).items())


def _trained(config: str, first: Sequence[str], without: Collection[str]) -> Iterator[tuple[str, str, str]]:
    """Name, config and kind of the core's rows and of each project's, as far as it has configs for the set.

    Args:
        first: projects that come before the others, in this order.
        without: projects that are left out.
    """
    yield CORE, f"configs/{config}.yaml", "unsupervised"
    yield SUPERVISED, f"configs/{config}.yaml", "supervised"
    found = {path.parent.name for path in ROOT.glob("projects/*/configs")}.difference(without)
    for project in [*(name for name in first if name in found), *sorted(found.difference(first))]:
        for name, ending in ((project, ""), (project + BASELINE, "_baseline")):
            file = f"projects/{project}/configs/{config}{ending}.yaml"
            if (ROOT / file).is_file():
                yield name, file, "unsupervised"
