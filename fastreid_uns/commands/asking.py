"""The questions that tell how good groups are, asked on a terminal."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastreid_uns.photos.store import PhotoRun

ANSWERS = {"s": "same", "d": "different", "u": "unsure"}


def ask(run: PhotoRun) -> None:
    """Ask the open pairs of the audit, here or on a page, as long as somebody answers."""
    from fastreid_uns.photos.verdict import open_pairs

    pairs = open_pairs(run)
    if not pairs:
        return
    print(
        f"\nThe groups are written. {len(pairs)} questions tell how far they can be trusted: do two photos show the "
        f"same individual?"
    )
    choice = _chosen("Answer [p] on a page in the browser, [h] here, or [n] not now? ", "phn", "n")
    if choice == "p":
        from fastreid_uns.commands.review import show

        show(run)
    elif choice == "h":
        _here(run)


def _here(run: PhotoRun) -> None:
    from fastreid_uns.errors import UserError
    from fastreid_uns.photos.decisions import Decisions
    from fastreid_uns.photos.verdict import open_pairs

    decisions = Decisions(run.folder / "decisions.csv")
    number = 0
    while pairs := open_pairs(run):
        first, second = pairs[0]
        number += 1
        print(f"\n{number} of {number + len(pairs) - 1}")
        for name in (first, second):
            print(f"  {run.photo(name).as_uri()}")
        choice = _chosen("[s]ame, [d]ifferent, [u]nsure, or [q]uit? ", "sduq", "q")
        if choice == "q":
            return
        try:
            decisions.pair(first, second, ANSWERS[choice])
        except UserError as error:
            print(error)


def _chosen(prompt: str, accepted: str, at_end: str) -> str:
    """One of the accepted letters; `at_end` where there is no more input."""
    while True:
        try:
            text = input(prompt[: shutil.get_terminal_size().columns - 2]).strip().lower()
        except EOFError:
            return at_end
        if text[:1] and text[0] in accepted:
            return text[0]
