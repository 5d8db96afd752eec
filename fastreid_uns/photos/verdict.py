"""How good the groups of a run are, as far as answers tell: what is asked, and what is said about it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np

from fastreid_uns.photos.audit import (
    GOOD,
    QUESTIONS,
    PairPrecision,
    audit_pairs,
    calibrated,
    pair_precision,
    pairs_inside,
    rough_estimate,
)
from fastreid_uns.photos.decisions import Decisions
from fastreid_uns.photos.members import Member
from fastreid_uns.photos.questions import Question
from fastreid_uns.photos.store import PhotoRun

_URGENT = 1e12  # weight of a question of the audit on the review page, above that of every other

ADVICE = (
    "Do not rely on these groups: too many of their pairs are different individuals. Weights of your field help most "
    "(--weights hf-hub:...), then photos that are cropped to the subject, more photos of each individual, and the "
    "review page."
)


def draw(members: Sequence[Member], seed: int) -> dict[str, object]:
    """The audit of new groups: random pairs inside them, and as many in reserve for answers that are `unsure`."""
    labels = np.array([member.group for member in members])
    confidence = np.array([member.confidence for member in members])
    pairs = [*audit_pairs(labels, confidence, seed=seed).tolist(), *pairs_inside(labels, seed=seed + 1).tolist()]
    names = dict.fromkeys((members[one].path, members[other].path) for one, other in pairs)
    return {"pairs": list(names), "rough": rough_estimate(confidence, labels)}


def open_pairs(run: PhotoRun) -> list[tuple[str, str]]:
    """Pairs of the audit that are still to be asked, as many as it needs."""
    decisions = Decisions(run.folder / "decisions.csv")
    relations = decisions.relations()
    unsure = {frozenset((*one.first, *one.second)) for one in decisions.active() if one.answer == "unsure"}
    pairs = [(first, second) for first, second in run.about.get("audit", {}).get("pairs", [])]
    known = sum(relations.relation(*pair) is not None for pair in pairs)
    left = (pair for pair in pairs if relations.relation(*pair) is None and frozenset(pair) not in unsure)
    return list(islice(left, max(QUESTIONS - known, 0)))


def judge(run: PhotoRun) -> PairPrecision:
    """What the answers so far say; it is noted in run.json for the report and for `identify`."""
    audit = run.about.get("audit", {})
    relations = Decisions(run.folder / "decisions.csv").relations()
    answers = (relations.relation(first, second) for first, second in audit.get("pairs", []))
    found = [answer for answer in answers if answer is not None][:QUESTIONS]
    same = found.count("same")
    precision = pair_precision(audit.get("rough", 0.5), same, len(found) - same)
    bad = precision.verified and precision.estimate < GOOD
    text = str(precision) if audit.get("pairs") else "no group has two photos, so there is no pair to be right or wrong"
    stated = {
        "statement": f"{text[0].upper()}{text[1:]}.",
        "verified": precision.verified,
        "advice": ADVICE if bad else "",
        "precision": round(precision.estimate, 4),
        "answers": precision.answers,
    }
    run.update(audit={**audit, **stated})
    return precision


def calibrate(run: PhotoRun, precision: PairPrecision) -> None:
    """Make the confidence of all photos agree with the answers; the groups stay, and what is asked about them."""
    members, asked = run.groups(), run.questions()
    labels = np.array([member.group for member in members])
    now = calibrated(np.array([member.confidence for member in members]), labels, precision.estimate)
    run.write_groups([one._replace(confidence=float(value)) for one, value in zip(members, now, strict=True)])
    if asked is not None:
        run.save_questions(asked)


def questions(run: PhotoRun, others: Sequence[Question]) -> list[Question]:
    """What the review page asks: the audit first, then what moves the groups."""
    audit = [Question(first, second, _URGENT - place) for place, (first, second) in enumerate(open_pairs(run))]
    asked = {frozenset((one.first, one.second)) for one in audit}
    return [*audit, *(one for one in others if frozenset((one.first, one.second)) not in asked)]
