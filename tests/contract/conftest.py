"""The contracts hold for the parts of all projects, so these are registered before the tests are collected."""

import importlib
import pkgutil

import fastreid_uns.builtin
import fastreid_uns.projects

for project in pkgutil.iter_modules(fastreid_uns.projects.__path__):
    importlib.import_module(f"fastreid_uns.projects.{project.name}")
