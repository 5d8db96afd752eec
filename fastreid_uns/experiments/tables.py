"""What records say together: tables of scores and of effects, as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fastreid_uns.experiments.agenda import score
from fastreid_uns.experiments.effects import LEVEL, Difference, holm, paired, verdict
from fastreid_uns.experiments.figures import Figure, published_figures
from fastreid_uns.experiments.runs import KINDS, of_project
from fastreid_uns.experiments.study import BASELINE, CORE, SUPERVISED, UNTRAINED, step_number

Record = dict[str, Any]
Missing = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Table:
    """Cells of text below headers."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """A table of GitHub's Markdown."""
        return tabulate(self.rows, self.headers, tablefmt="github", disable_numparse=True)

    def latex(self) -> str:
        """A `tabular` with the rules of the package booktabs."""
        return tabulate(self.rows, self.headers, tablefmt="latex_booktabs", disable_numparse=True)

    def csv(self) -> str:
        """Comma-separated values, the headers first."""
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerows([self.headers, *self.rows])
        return stream.getvalue()


def tables(records: Sequence[Record], project: str = "") -> list[Table]:
    """All tables of some records: of each study its scores, effects and trials, then of each other test set its scores.

    Args:
        records: of runs on test parts and on validation identities.
        project: show its rows and those of the core only; effects are still adjusted for all of them.
    """
    found: list[Table] = []
    ended = [record for record in records if "results" in record]
    for study in dict.fromkeys(record["study"] for record in ended if record.get("study")):
        own = [record for record in ended if record.get("study") == study]
        measured, trials = [[r for r in own if bool(r["hold_out"]) == held_out] for held_out in (False, True)]
        if measured:
            found += [study_table(measured, project), *effect_tables(measured, project)]
        if trials:
            found.append(trial_table(trials, project))
    loose = [record for record in ended if not record.get("study") and not record["hold_out"]]
    return [*found, *config_tables(of_one_project(loose, project) if project else loose)]


def study_table(records: Sequence[Record], project: str = "") -> Table:
    """Scores of the rows of a study: mean and standard deviation over seeds, and the settings that were chosen.

    Beside them is what the paper of a method reports on Market-1501, which is another set with another budget. Steps of
    a ladder have neither.
    """
    published, shared = published_figures(), _shared(records)
    cells = []
    for name, group in _shown(records, project):
        seconds = statistics.mean(record["seconds"] for record in group)
        paper = published.get((_market_config(name), "market1501"))
        settings = _setting(group[0], shared)
        cells.append([name, str(len(group)), *_scores(group), f"{seconds:.0f}", settings, paper.mAP if paper else ""])
    headers = [records[0]["study"], "seeds", "mAP", "rank-1", "seconds", "chosen settings", "paper, Market-1501"]
    said = (
        5 if any(step_number(record["row"]) for record in records) else len(headers)
    )  # a ladder is not tuned, and no paper has its steps
    return Table(headers[:said], [row[:said] for row in cells])


def trial_table(records: Sequence[Record], project: str = "") -> Table:
    """What tuning gave: mAP on validation identities with a row's own settings and with the best ones, one run each."""
    shared = _shared(records)
    cells = []
    for name, group in _shown(records, project):
        own = [f"{score(record):.1f}" for record in group if shared.issuperset(record["overrides"])]
        best = max(group, key=score)
        cells.append([name, str(len(group)), *(own or [""]), f"{score(best):.1f}", _setting(best, shared)])
    study = records[0]["study"]
    return Table([f"{study}, validation identities", "runs", "own settings, mAP", "best mAP", "best settings"], cells)


def effect_tables(records: Sequence[Record], project: str = "") -> list[Table]:
    """Paired differences in mAP: of each method to its baseline, of the core to the start, of true labels to the core.

    Of a ladder: of each step to the one before it, and of the last one to the first. Each is adjusted for the number of
    all of them. A row that is no step and lacks a seed of another row is not compared yet. Nothing where no two rows
    can be.
    """
    scores = {name: {r["seed"]: score(r) for r in group} for name, group in by_row(records).items()}
    seeds = set().union(*scores.values())
    methods = [(name, name + BASELINE) for name in sorted(scores) if name + BASELINE in scores]
    steps = sorted(filter(step_number, scores), key=step_number)
    ladder = [*zip(steps[1:], steps[:-1], strict=True), *([(steps[-1], steps[0])] if len(steps) > 2 else [])]
    pairs = [*methods, *ladder, (CORE, UNTRAINED), (SUPERVISED, CORE)]
    pairs = [(a, b) for a, b in pairs if scores.get(a, {}).keys() & scores.get(b, {}).keys()]
    pairs = [(a, b) for a, b in pairs if step_number(a) or scores[a].keys() == scores[b].keys() == seeds]
    if not pairs:
        return []
    differences = [paired(scores[a], scores[b]) for a, b in pairs]
    adjusted = holm([difference.p for difference in differences])
    cells = [
        [f"{a} - {b.removeprefix(a + ' ')}", *_difference(difference), _probability(p), verdict(difference, p)]
        for (a, b), difference, p in zip(pairs, differences, adjusted, strict=True)
        if not project or step_number(a) or a in (project, CORE)
    ]
    headers = [f"{records[0]['study']}, mAP", "seeds", "difference", "95 % interval", "Holm p", f"effect (p < {LEVEL})"]
    return [Table(headers, cells)]


def by_row(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records of each row of a study, by seed."""
    rows = defaultdict(list)
    for record in sorted(records, key=lambda r: r["seed"]):
        rows[record["row"]].append(record)
    return rows


def _shown(records: Sequence[Record], project: str) -> list[tuple[str, list[Record]]]:
    """Name and records of each row of a study, in their order; of a project only its rows and those of the core."""
    rows = by_row(records)
    names = {UNTRAINED, CORE, SUPERVISED, project, project + BASELINE, *filter(step_number, rows)} if project else rows
    return [(name, rows[name]) for name in sorted(rows, key=_place_in_study) if name in names]


def _shared(records: Iterable[Record]) -> set[str]:
    """The keys that all runs have changed to the same value."""
    return set.intersection(*(set(record["overrides"]) for record in records))


def _setting(record: Record, shared: set[str]) -> str:
    return ", ".join(_short(override) for override in record["overrides"] if override not in shared) or "own"


def config_tables(records: Sequence[Record]) -> list[Table]:
    """For each test set the scores of each config and kind of labels, beside published figures if there are any."""
    groups = defaultdict(list)
    for record in sorted(records, key=lambda r: (of_project(r["config"]), r["config"], r["seed"])):
        for test in record["results"]:
            groups[test, record["config"], record["kind"]].append(record)
    published = published_figures()
    found = []
    for test in dict.fromkeys(test for test, _, _ in groups):
        rows = []
        for kind, config in sorted(((k, c) for t, c, k in groups if t == test), key=place):
            group = groups[test, config, kind]
            seconds = statistics.mean(record["seconds"] for record in group)
            figure = published.get((config, test)) if kind == "unsupervised" else None
            rows.append([config, kind, str(len(group)), *_scores(group, test), f"{seconds:.0f}", _published(figure)])
        headers = [f"config, tested on {test}", "labels", "seeds", "mAP", "rank-1", "seconds", "published mAP / rank-1"]
        if not any(row[-1] for row in rows):
            headers, rows = headers[:-1], [row[:-1] for row in rows]
        found.append(Table(headers, rows))
    return found


def place(row: tuple[str, str]) -> tuple:
    """Untrained first and true labels last; in between the core, then the projects by name."""
    kind, config = row
    return KINDS.index(kind), of_project(config), config


def spread(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def report(records: Sequence[Record], project: str = "", missing: Missing | None = None) -> str:
    """The tables in Markdown, on what their figures were measured, and what has not been measured.

    Args:
        records: of runs.
        project: see `tables`; studies without a row of it are left out.
        missing: rows that lack seeds, by study.
    """
    if project:
        records = _of_studies_with(project, records)
    shown = [table.markdown() for table in tables(records, project)]
    rows = {study: [name for name in names if project in ("", name)] for study, names in (missing or {}).items()}
    absent = [
        f"{study}: not measured with all seeds yet: {', '.join(names)}." for study, names in rows.items() if names
    ]
    return "\n\n".join([*shown, provenance(records), *absent])


def _of_studies_with(project: str, records: Sequence[Record]) -> list[Record]:
    """The records of studies that have a row of the project or are ladders, and those of none."""
    rows = {project, project + BASELINE}
    studies = {r.get("study") for r in records if not r.get("study") or r["row"] in rows or step_number(r["row"])}
    return [r for r in records if r.get("study") in studies]


def write_tables(folder: Path, records: Sequence[Record], missing: Missing | None = None) -> None:
    """Write `tables.md`, `tables.csv` and `tables.tex`, each with all tables, an empty line between two of them."""
    folder.mkdir(parents=True, exist_ok=True)
    found = tables(records)
    texts = {
        "tables.md": report(records, missing=missing) + "\n",
        "tables.csv": "\n".join(table.csv() for table in found),
        "tables.tex": "\n\n".join(table.latex() for table in found) + "\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def provenance(records: Sequence[Record]) -> str:
    """Sentences for each study, and for what belongs to none: seeds, keys, trials, hardware, library and commits."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if "results" in record:
            groups[record.get("study", "")].append(record)
    return "\n\n".join(_provenance(study, group) for study, group in groups.items())


def _provenance(study: str, records: Sequence[Record]) -> str:
    tests, trials = [[r for r in records if bool(r["hold_out"]) == held_out] for held_out in (False, True)]
    common = [o for o in records[0]["overrides"] if all(o in r["overrides"] for r in records)]
    keys = " ".join(f"`{key}`" for key in common) or "no key changed"
    seeds = ", ".join(map(str, sorted({r["seed"] for r in tests}))) or "none yet"
    chosen = f" {len(trials)} runs on validation identities chose the settings ({_places(trials)})." if trials else ""
    start = f"{study}: seeds" if study else "Seeds"
    return f"{start} {seeds}; {_places(tests or trials)}; {keys}.{chosen}"


def _places(records: Sequence[Record]) -> str:
    """Hardware, library and commits of runs."""
    places = {f"{r['environment']['device']}, torch {r['environment']['torch']}" for r in records}
    commits = ", ".join(dict.fromkeys(r["environment"]["commit"] for r in records))
    return f"{'; '.join(sorted(places))}; commit {commits}"


def of_one_project(records: Sequence[Record], project: str) -> list[Record]:
    """The runs of a project, and those of the core on the same sets; of records without a study."""
    folder = f"projects/{project}/"
    sets = {test for r in records if r["config"].startswith(folder) for test in r["results"]}
    return [
        r for r in records if r["config"].startswith(folder) or (not of_project(r["config"]) and sets & {*r["results"]})
    ]


def _market_config(name: str) -> str:
    return "configs/base.yaml" if name == CORE else f"projects/{name}/configs/market.yaml"


def _place_in_study(name: str) -> tuple[int, int, str]:
    first = {UNTRAINED: 0, CORE: 1, SUPERVISED: 3}
    return first.get(name, 2), step_number(name), name


def _scores(group: Sequence[Record], test: str = "") -> list[str]:
    found = [record["results"][test] if test else next(iter(record["results"].values())) for record in group]
    return [spread([metrics[metric] for metrics in found]) for metric in ("mAP", "rank1")]


def _difference(difference: Difference) -> list[str]:
    interval = f"{difference.low:+.2f} to {difference.high:+.2f}" if difference.seeds > 1 else ""
    return [str(difference.seeds), f"{difference.mean:+.2f}", interval]


def _probability(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _published(figure: Figure | None) -> str:
    return f"{figure.mAP} / {figure.rank1 or '-'} ({figure.source})" if figure else ""


def _short(override: str) -> str:
    """`PSEUDO_LABELS.EPS=0.5` as `EPS 0.5`; a key of a loss keeps the name of the loss."""
    key, _, value = override.partition("=")
    parts = key.split(".")
    return f"{'.'.join(parts[-2:] if 'LOSSES' in parts else parts[-1:])} {value}"
