"""Which run comes next, given those that are done."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastreid_uns.experiments.runs import Job
from fastreid_uns.experiments.study import BASELINE, Row, Setting, Study


class Agenda:
    """Runs that are started once each.

    Args:
        records: of earlier runs, which are not started again; new ones are added with `add`.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]]) -> None:
        self.started: set[tuple] = set()
        self.scores: dict[tuple, float] = {}  # of finished runs
        for record in records:
            self.add(record)

    def add(self, record: Mapping[str, Any]) -> None:
        """Take over the record of a run that has ended; one that failed is the worst one."""
        key = key_of(record)
        self.started.add(key)
        if "results" in record:
            self.scores[key] = score(record)
        elif not record.get("lost"):
            self.scores[key] = -math.inf

    def following(self) -> Job | None:
        """The most important run that can start now, which counts as started then; None if there is none."""
        for job in self.open():
            if job.key not in self.started:
                self.started.add(job.key)
                return job
        return None

    def open(self) -> Iterator[Job]:
        """The runs that can start now or have been started, the most important one first."""
        raise NotImplementedError


class Listed(Agenda):
    """The runs of a list."""

    def __init__(self, jobs: Sequence[Job], records: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(records)
        self.jobs = jobs

    def open(self) -> Iterator[Job]:
        """All of them."""
        yield from self.jobs


class Studied(Agenda):
    """The runs of studies: a row is tuned and then measured before the next one, as far as runs need not wait.

    Rows of a study without tuning are measured one seed after the other.

    Args:
        studies: in the order of their importance.
        records: of earlier runs.
    """

    def __init__(self, studies: Sequence[Study], records: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(records)
        self.studies = studies

    def open(self) -> Iterator[Job]:
        """Of each row its trials, and its seeds once the trials have ended."""
        for study in self.studies:
            if not study.tuning.trials:
                for jobs in zip(*(self.seeds(study, row) for row in study.rows), strict=True):
                    yield from jobs
                continue
            for row in study.rows:
                yield from (study.trial(row, setting) for setting in self.trials(study, row))
                yield from self.seeds(study, row)

    def trials(self, study: Study, row: Row) -> list[Setting]:
        """The settings that a row tries, as far as those before them have ended."""
        return study.trials(row, lambda setting: self.scores.get(study.trial(row, setting).key))

    def chosen(self, study: Study, row: Row) -> Setting | None:
        """The setting with the best mAP on validation identities, the first of equals.

        None while a trial is missing, and for a row of which every trial has failed.
        """
        settings = self.trials(study, row)
        if not settings:
            return ()
        scores = [self.scores.get(study.trial(row, setting).key, math.nan) for setting in settings]
        if any(map(math.isnan, scores)) or max(scores) == -math.inf:
            return None
        return settings[scores.index(max(scores))]

    def seeds(self, study: Study, row: Row) -> list[Job]:
        """The runs of a row on the test part; [] as long as its setting is not chosen."""
        setting = self.chosen(study, row)
        return [] if setting is None else study.measured(row, setting)


def current(agenda: Studied, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of studies that count: trials, and runs on the test part with the setting that is chosen now."""
    keys = {job.key for study in agenda.studies for row in study.rows for job in agenda.seeds(study, row)}
    return [record for record in records if record["hold_out"] or key_of(record) in keys]


def unmeasured(agenda: Studied, study: Study) -> list[str]:
    """The rows that lack a seed; a project stands for itself and its baseline."""
    missing = [
        row.name.removesuffix(BASELINE)
        for row in study.rows
        if not (jobs := agenda.seeds(study, row)) or any(job.key not in agenda.scores for job in jobs)
    ]
    return list(dict.fromkeys(missing))


def key_of(record: Mapping[str, Any]) -> tuple:
    """`Job.key` of the run that a record is of."""
    return record["config"], record["kind"], record["seed"], tuple(record["overrides"]), record["hold_out"]


def score(record: Mapping[str, Any]) -> float:
    """mAP on the first test set."""
    return next(iter(record["results"].values()))["mAP"]
