"""The first plugin: imports every module of the core that registers something."""

import importlib

MODULES = [
    "data.datasets.synthetic",
]

for _module in MODULES:
    importlib.import_module(f"fastreid_uns.{_module}")
