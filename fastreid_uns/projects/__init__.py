"""Makes the checkout's `projects/` folder importable as `fastreid_uns.projects.<PAPER>`."""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2] / "projects"
if _checkout.is_dir():
    __path__.append(str(_checkout))
