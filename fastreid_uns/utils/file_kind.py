"""What a file is, by its first bytes."""

from __future__ import annotations

from pathlib import Path

_START = 512  # bytes that are read
_FOREIGN = {
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"%PDF": "a PDF document",
    b"\x1f\x8b": "an archive (gzip). Unpack it.",
    b"\x89HDF": "an HDF5 file, as Keras writes it. Convert it where it was made.",
}


def foreign_kind(path: Path) -> str | None:
    """What a file is that should hold weights and cannot, as the end of a sentence and what to do.

    Returns:
        None for what may be a pickle, a zip archive or a safetensors file.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(_START)
    if not start:
        return "an empty file. Download it again."
    if start[:1] == b"\x80" or start.startswith(b"PK\x03\x04") or is_safetensors(path):
        return None
    if known := known_kind(start):
        return known
    if _is_text(start):
        return f"text that begins with {start[:40].decode('utf-8', 'replace')!r}. Check the path or download it again."
    return f"bytes of an unknown kind, beginning with {start[:8].hex(' ')}. Check the path or download it again."


def known_kind(start: bytes) -> str | None:
    """What the first bytes of a file say that it is, as the end of a sentence and what to do; None if they do not."""
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer: the repository was cloned without its large files. Run: git lfs pull"
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html")):
        return "an HTML page, perhaps of a login or a download. Open the address in a browser and save the file."
    found = next((kind for begin, kind in _FOREIGN.items() if start.startswith(begin)), None)
    return found if found is None or "." in found else f"{found}. Check the path."


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do, whatever its name: eight bytes of length, then JSON."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) > 8 and start[8:9] == b"{" and start[7:8] == b"\0"


def _is_text(start: bytes) -> bool:
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(start) - 3:  # a letter may be cut at the end
            return False
        text = start[: error.start].decode("utf-8")
    return all(letter.isprintable() or letter in "\t\r\n" for letter in text)
