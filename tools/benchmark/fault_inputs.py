"""Wrong input of a training command: files that are something else, values of another kind, names that do not exist."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


def flat(tree: dict[str, Any], where: str = "") -> dict[str, Any]:
    """Keys with dots → values."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{where}.{key}".lstrip(".")
        found |= flat(value, path) if isinstance(value, dict) and value else {path: value}
    return found


def wrong_keys(config_file: Path) -> Iterator[tuple[str, list[str]]]:
    """For each key of a config: a value of another kind, and a name that is nearly right."""
    import yaml

    config = yaml.safe_load(config_file.read_text())
    wrong = {
        bool: ["perhaps", "[1]"],
        int: ["many", "[1]", "-7000"],
        float: ["much", "{a: 1}", ".nan"],
        str: ["no such thing"],
        list: ["5", "{a: 1}"],
        dict: ["5", "{a: 1}"],
    }
    free = ("SEED", "ROOT", "FOLDER", "DIR", "FILE", "OPTIMIZER_ARGS", "PLUGINS")  # take any text or number
    for key, value in flat(config).items():
        if key.startswith("PAPER") or key.endswith(free):  # not read here
            continue
        for text in wrong.get(type(value), []):
            yield f"{key} {text}", [key, text]
        yield f"{key}X", [f"{key}X", "1"]
    for key in flat(config):
        if key.endswith(".NAME") and not key.startswith("PAPER"):
            yield f"{key} unknown", [key, "NoSuchThing"]


def wrong_files(place: Path, finished: Path) -> Iterator[tuple[str, list[str]]]:
    """Files and folders that are not what they should be.

    Args:
        place: a folder to make them in.
        finished: the folder of a finished run.
    """
    place.mkdir(parents=True)
    texts = {
        "empty.yaml": b"",
        "list.yaml": b"- 1\n- 2\n",
        "broken.yaml": b"SOLVER: {EPOCHS: 3\n",
        "binary.yaml": bytes(range(256)) * 4,
        "null.yaml": b"MODEL:\n",
        "base.yaml": b"_BASE_: 5\n",
        "circle.yaml": b"_BASE_: circle.yaml\n",
        "twice.yaml": b"SEED: 1\nSEED: 2\n",
        "plugin.yaml": b"PLUGINS: [no_such_plugin]\n",
        "file": b"a file",
        "lfs.pth": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        "page.pth": b"<!DOCTYPE html><html></html>",
        "text.pth": b"weights\n",
        "nothing.pth": b"",
        "cut.pth": (finished / "best.pth").read_bytes()[:20_000],
        "picture/a.jpg": b"\xff\xd8\xff and nothing more",
        "picture/b.jpg": b"no picture",
        "images/a.txt": b"no image",
        "table.csv": b"path,identity\nmissing.jpg,1\n",
        "header.csv": b"\x00\x01\x02",
    }
    for name, data in texts.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(data)
    for name in [*(name for name in texts if name.endswith(".yaml")), "missing.yaml", "file", "images", "lfs.pth"]:
        if name not in ("empty.yaml",):
            yield f"config {name}", ["--config-file", str(place / name)]
    for name in ["lfs.pth", "page.pth", "text.pth", "nothing.pth", "cut.pth", "missing.pth", "images", "picture/a.jpg"]:
        yield f"weights {name}", ["MODEL.WEIGHTS", str(place / name)]
    for name in ["images", "picture", "missing", "file"]:
        yield f"folder {name}", ["DATASETS.TRAIN", f"{{NAME: folder, ROOT: {place / name}}}"]
    for name in ["table.csv", "header.csv", "missing.csv", "images"]:
        yield f"table {name}", ["DATASETS.TRAIN", f"{{NAME: csv_file, FILE: {place / name}}}"]
    for name in ["file", "file/run"]:
        yield f"output {name}", [f"OUTPUT_DIR={place / name}"]
    yield "output of another run", [f"OUTPUT_DIR={finished}"]
    yield "another config resumed", ["--resume", f"OUTPUT_DIR={finished}", "SOLVER.BASE_LR", "0.5"]
    yield "fewer epochs resumed", ["--resume", f"OUTPUT_DIR={finished}", "SOLVER.EPOCHS", "1"]
    yield "nothing to evaluate", ["--eval-only"]
    for flags in (
        ["--no-such-flag"],
        ["--num-gpus", "0"],
        ["--num-gpus", "two"],
        ["SOLVER.EPOCHS"],
        ["=", "="],
        ["--config-file"],
    ):
        yield f"arguments {' '.join(flags)}", flags
