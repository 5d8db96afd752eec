"""How a config differs from what its paper states, or from that of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastreid_uns.config.loading import CfgNode, parse_config
from fastreid_uns.errors import InvalidValue

# keys that may differ between a checkpoint and the run that resumes from it
FREE_KEYS = (
    "PLUGINS",
    "PAPER",
    "PSEUDO_LABELS.DECISIONS",  # answers are given while a run goes on
    "OUTPUT_DIR",
    "LOG",
    "CHECKPOINT",
    "TEST",
    "DATASETS.TESTS",
    "DATALOADER.CACHE",
    "DATALOADER.CACHE_DIR",
    "DATALOADER.WORKERS",
    "MODEL.DEVICE",
    "MODEL.WEIGHTS",
    "DISTRIBUTED",
    "SOLVER.COMPILE",
    "SOLVER.FIND_UNUSED",
)


def deviations(cfg: CfgNode) -> list[str]:
    """Where a config departs from its `PAPER`: `KEY: value instead of value` for each such key."""
    found = []

    def compare(stated: Mapping, held: Any, where: str) -> None:
        for key, value in stated.items():
            path = f"{where}.{key}".lstrip(".")
            own = held.get(key) if isinstance(held, Mapping) else None
            if isinstance(value, Mapping):
                compare(value, own, path)
            elif own != value:
                found.append(f"{path}: {own} instead of {value}")

    compare(cfg.PAPER, cfg, "")
    return found


_COSINE = (
    "The cosine schedule falls over the whole run, so the epochs that are done had other rates than those of a run of "
    "another length; other schedules may be made longer. "
)


def refuse_other_config(saved: str, now: str, file: str | Path) -> None:
    """Compare the config of a checkpoint with the present one, apart from keys that do not steer training.

    Args:
        saved: YAML text of the checkpoint; keys that have come since then count with their defaults.
        now: YAML text of the present config, whose plugins are loaded.
        file: the checkpoint.

    Raises:
        ValueError: a key that matters differs; the message lists them with both values.
    """
    present = parse_config(now, trust=True)
    old = _flat(parse_config(saved, Path(file).name, plugins=present.PLUGINS))
    new = _flat(present)
    free = [*FREE_KEYS, *([] if new.get("SOLVER.SCHEDULE") == "cosine" else ["SOLVER.EPOCHS"])]
    differ = [
        f"{key}: {old.get(key, 'absent')!r} -> {new.get(key, 'absent')!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and not key.endswith(".ROOT")
        and not any(key == name or key.startswith(f"{name}.") for name in free)
    ]
    if differ:
        cosine = any(entry.startswith("SOLVER.EPOCHS:") for entry in differ)
        raise InvalidValue(
            f"checkpoint: {file} was made with another config; these keys differ: {'; '.join(differ)}. "
            f"{_COSINE if cosine else ''}Resume with the old values, or start anew in another OUTPUT_DIR with "
            f"MODEL.WEIGHTS {file}."
        )


def _flat(tree: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{where}{key}."))
        else:
            flat[f"{where}{key}"] = value
    return flat
