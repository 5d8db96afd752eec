"""Check a data set: layout, counts against the published ones, cameras, unreadable images, equal files, sizes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fastreid_uns.commands import finished
from fastreid_uns.errors import InvalidValue
from fastreid_uns.utils.places import expanded


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line of `check`."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Exit status: 0 = sound, 1 = some image is missing or unreadable, 2 = the set cannot be loaded.",
    )
    parser.add_argument("name", metavar="NAME", help="data set, for example market1501, folder or csv_file")
    parser.add_argument("keys", nargs="*", metavar="KEY VALUE", help="its keys, for example SIZE 1600 or PATH my.csv")
    parser.add_argument("--root", type=expanded, help="its folder; short for ROOT")
    parser.add_argument("--quick", action="store_true", help="open no image: no decoding, sizes and equal files")
    parser.add_argument("--plugins", nargs="+", default=[], help="entries of PLUGINS that register further data sets")
    return parser.parse_intermixed_args(arguments)


def keywords(name: str, keys: Sequence[str], root: str | None) -> dict[str, object]:
    """The keywords of a data-set function, in the types of its signature.

    Raises:
        ValueError: a key has no value, or one of another type.
    """
    from fastreid_uns.config.values import REQUIRED, Typed, cast
    from fastreid_uns.registry import DATASET_REGISTRY

    if len(keys) % 2:
        raise InvalidValue(f"{name}: key {keys[-1]} has no value; give KEY VALUE pairs.")
    schema = DATASET_REGISTRY.schema(name)
    found: dict[str, object] = {} if root is None else {"root": root}
    for key, text in zip(keys[::2], keys[1::2], strict=True):
        default = schema.get(key.lower(), "")
        found[key.lower()] = cast(Typed(text), "" if default is REQUIRED else default, f"{name}: {key}")
    required = [key.upper() for key, default in schema.items() if default is REQUIRED]
    missing = [key for key in required if key.lower() not in found]
    if missing:
        raise InvalidValue(f"{name}: {' and '.join(missing)} must be given; write {missing[0]} VALUE behind the name.")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """See `commands.main`."""
    return finished(run, parse_arguments(arguments))


def run(args: argparse.Namespace) -> int:
    """1 if an image is missing or unreadable, else 0."""
    import logging

    import fastreid_uns.builtin  # noqa: F401
    from fastreid_uns.commands.set_facts import show_set
    from fastreid_uns.plugins import load_plugins, resolve_plugin
    from fastreid_uns.registry import DATASET_REGISTRY

    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("fastreid_uns").setLevel(logging.INFO)
    load_plugins([resolve_plugin(entry, Path.cwd()) for entry in args.plugins])
    given = keywords(args.name, args.keys, args.root)
    data = DATASET_REGISTRY.build({"NAME": args.name, **{key.upper(): value for key, value in given.items()}})
    return int(show_set(data, args.name, given, args.quick))
