"""One copy of each project in the tests: pytest would import its package under other names as well."""

import importlib
import sys
from pathlib import Path

for _file in Path(__file__).parent.glob("*/__init__.py"):
    _name = _file.parent.name
    sys.modules[_name] = sys.modules[f"projects.{_name}"] = importlib.import_module(f"fastreid_uns.projects.{_name}")
