"""What records say together: tables of scores and of effects, as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
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
    """All tables of some records: of each study its scores and its effects, then of each other test set its scores.

    Args:
        records: of runs on test parts and on validation identities; the latter are in no table.
        project: show its rows and those of the core only; effects are still adjusted for all of them.
    """
    found: list[Table] = []
    measured = [record for record in records if "results" in record and not record["hold_out"]]
    studies = dict.fromkeys(record["study"] for record in measured if record.get("study"))
    for study in studies:
        own = [record for record in measured if record.get("study") == study]
        found += [study_table(own, project), *effect_tables(own, project)]
    loose = [record for record in measured if not record.get("study")]
    return [*found, *config_tables(of_one_project(loose, project) if project else loose)]


def study_table(records: Sequence[Record], project: str = "") -> Table:
    """Scores of the rows of a study: mean and standard deviation over seeds, and the settings that were chosen.

    Beside them is what the paper of a method reports on Market-1501, which is another set with another budget. Steps of
    a ladder have neither.
    """
    rows, published = by_row(records), published_figures()
    shared = set.intersection(*(set(record["overrides"]) for record in records))
    cells = []
    for name in sorted(rows, key=_place_in_study):
        if project and not step_number(name) and name not in (UNTRAINED, CORE, SUPERVISED, project, project + BASELINE):
            continue
        group = rows[name]
        chosen = [override for override in group[0]["overrides"] if override not in shared]
        settings = ", ".join(_short(override) for override in chosen) or "own"
        seconds = statistics.mean(record["seconds"] for record in group)
        paper = published.get((_market_config(name), "market1501"))
        cells.append([name, str(len(group)), *_scores(group), f"{seconds:.0f}", settings, paper.mAP if paper else ""])
    headers = [records[0]["study"], "seeds", "mAP", "rank-1", "seconds", "chosen settings", "paper, Market-1501"]
    said = 5 if any(map(step_number, rows)) else len(headers)  # a ladder is not tuned, and no paper has its steps
    return Table(headers[:said], [row[:said] for row in cells])


def effect_tables(records: Sequence[Record], project: str = "") -> list[Table]:
    """Paired differences in mAP: of each method to its baseline, of the core to the start, of true labels to the core.

    Of a ladder: of each step to the one before it, and of the last one to the first. Each is adjusted for the number of
    all of them. Nothing where no two rows can be compared.
    """
    scores = {name: {r["seed"]: score(r) for r in group} for name, group in by_row(records).items()}
    methods = [(name, name + BASELINE) for name in sorted(scores) if name + BASELINE in scores]
    steps = sorted(filter(step_number, scores), key=step_number)
    ladder = [*zip(steps[1:], steps[:-1], strict=True), *([(steps[-1], steps[0])] if len(steps) > 2 else [])]
    pairs = [*methods, *ladder, (CORE, UNTRAINED), (SUPERVISED, CORE)]
    pairs = [(a, b) for a, b in pairs if scores.get(a, {}).keys() & scores.get(b, {}).keys()]
    if not pairs:
        return []
    differences = [paired(scores[a], scores[b]) for a, b in pairs]
    adjusted = holm([difference.p for difference in differences])
    cells = [
        [f"{a} - {b.removeprefix(a + ' ')}", *_difference(difference), f"{p:.3f}", verdict(difference, p)]
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


def report(records: Sequence[Record], project: str = "") -> str:
    """The tables in Markdown, and on what their figures were measured."""
    shown = [table.markdown() for table in tables(records, project)]
    return "\n\n".join([*shown, provenance(records)])


def write_tables(folder: Path, records: Sequence[Record]) -> None:
    """Write `tables.md`, `tables.csv` and `tables.tex`, each with all tables, an empty line between two of them."""
    folder.mkdir(parents=True, exist_ok=True)
    found = tables(records)
    texts = {
        "tables.md": "\n\n".join([*(table.markdown() for table in found), provenance(records)]) + "\n",
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
    places = {f"{r['environment']['device']}, torch {r['environment']['torch']}" for r in records}
    commits = ", ".join(dict.fromkeys(r["environment"]["commit"] for r in records))
    common = [o for o in records[0]["overrides"] if all(o in r["overrides"] for r in records)]
    keys = " ".join(f"`{key}`" for key in common) or "no key changed"
    seeds = ", ".join(map(str, sorted({r["seed"] for r in records if not r["hold_out"]})))
    tried = sum(1 for r in records if r["hold_out"])
    trials = f" {tried} runs on validation identities chose the settings." if tried else ""
    start = f"{study}: seeds" if study else "Seeds"
    return f"{start} {seeds}; {'; '.join(sorted(places))}; commit {commits}; {keys}.{trials}"


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


def _published(figure: Figure | None) -> str:
    return f"{figure.mAP} / {figure.rank1 or '-'} ({figure.source})" if figure else ""


def _short(override: str) -> str:
    """`PSEUDO_LABELS.EPS=0.5` as `EPS 0.5`."""
    key, _, value = override.partition("=")
    return f"{key.rpartition('.')[2]} {value}"
