"""Keys and names of before: a config that is written by hand is told the new one, that of a checkpoint is translated.

Keys are written with dots; `*` is any entry of a map such as `MODEL.LOSSES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KEYS = {
    "PROTOCOL": "PAPER",
    "INPUT.AUGMENTS.*.GREY": "INPUT.AUGMENTS.*.GRAY",
    "LOG.PERIOD": "LOG.PERIOD_STEPS",
    "MODEL.DOMAIN_NORM": "MODEL.DOMAIN_BN",
    "MODEL.GUIDE_WEIGHT": "MODEL.PRETRAINED_WEIGHT",
    "MODEL.NORM_GROUP": "MODEL.GHOST_BATCH",
    "MODEL.RAW_QUERIES": "MODEL.UNNORMALIZED_QUERIES",
}
VALUES: dict[str, dict[Any, str]] = {
    "INPUT.CAMERA_STYLE.KIND": {"colours": "colors"},
    "TEST.RERANK": {False: "none", True: "jaccard"},
    "MODEL.LOSSES.*.NAME": {"RawTripletLoss": "UnnormalizedTripletLoss"},
    "HOOKS.*.NAME": {"GuideHook": "PretrainedTeacherHook"},
}
GONE = {
    "DATALOADER.FEED": "DATALOADER.CACHE: none decodes in every epoch, device, host and disk decode once",
}
_MAPS = ("INPUT.AUGMENTS", "MODEL.LOSSES", "HOOKS")


def new_key(path: str) -> str | None:
    """What to write instead of a key that is not known any more, as a message says it; None for a word never known."""
    if path in GONE:
        return f"{path} was replaced by {GONE[path]}."
    pattern = _pattern(path)
    if pattern not in KEYS:
        return None
    name = KEYS[pattern].rpartition(".")[2]
    return f"{path} was renamed to {'.'.join([*path.split('.')[:-1], name])}. Write the new name."


def new_value(path: str, value: Any) -> str | None:
    """The present word for a value of before; None if it has none."""
    return VALUES.get(_pattern(path), {}).get(value) if isinstance(value, (str, bool)) else None


def translate(tree: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """A config of before in the words of today; what is written in these already stays as it is."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{where}.{key}".lstrip(".")
        new = KEYS.get(_pattern(path))
        name = new.rpartition(".")[2] if new else key
        if isinstance(value, Mapping):
            value = translate(value, "" if name == "PAPER" and not where else path)
        found[name] = new_value(path, value) or value
    return _one_cache_key(found) if where == "DATALOADER" else found


def _one_cache_key(section: dict[str, Any]) -> dict[str, Any]:
    """`FEED: loader` is `CACHE: none`, and `FEED: cached` says nothing that CACHE does not."""
    feed = section.pop("FEED", None)
    return {**section, "CACHE": "none"} if feed == "loader" else section


def _pattern(path: str) -> str:
    for map_path in _MAPS:
        if path.startswith(f"{map_path}."):
            _, _, key = path[len(map_path) + 1 :].partition(".")
            return f"{map_path}.*.{key}" if key else path
    return path
