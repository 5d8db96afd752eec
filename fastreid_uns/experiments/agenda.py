"""Which run comes next, given those that are done."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastreid_uns.experiments.runs import Job
from fastreid_uns.experiments.study import Row, Study


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
        key = (record["config"], record["kind"], record["seed"], tuple(record["overrides"]), record["hold_out"])
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
    """The runs of studies: all trials of a study, then its seeds; a row is measured as soon as it is tuned.

    Args:
        studies: in the order of their importance.
        records: of earlier runs.
    """

    def __init__(self, studies: Sequence[Study], records: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(records)
        self.studies = studies

    def open(self) -> Iterator[Job]:
        """Trials, then one seed of every tuned row after the other."""
        for study in self.studies:
            for row in study.rows:
                yield from (job for _, job in study.tried(row))
            chosen = [(row, self.chosen(study, row)) for row in study.rows]
            plans = [study.measured(row, setting) for row, setting in chosen if setting is not None]
            for jobs in zip(*plans, strict=True):
                yield from jobs

    def chosen(self, study: Study, row: Row) -> tuple[str, ...] | None:
        """The setting with the best mAP on validation identities, the first of equals.

        None while a trial is missing, and for a row of which every trial has failed.
        """
        trials = study.tried(row)
        if not trials:
            return ()
        scores = [self.scores.get(job.key, math.nan) for _, job in trials]
        if any(map(math.isnan, scores)) or max(scores) == -math.inf:
            return None
        return trials[scores.index(max(scores))][0]


def score(record: Mapping[str, Any]) -> float:
    """mAP on the first test set."""
    return next(iter(record["results"].values()))["mAP"]
