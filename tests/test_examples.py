"""The examples in the docstrings of classes that a user builds by hand."""

from __future__ import annotations

import ast
import doctest
import importlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fastreid_uns"
CLASSES = {
    "registry": ["Registry"],
    "structures": ["PseudoLabels"],
    "predictor": ["FeatureExtractor"],
    "data.augment": ["Augment"],
    "data.image_set": ["ImageSet"],
    "data.samplers": ["ClusterSampler", "RandomSampler"],
    "data.train_set": ["TrainSet"],
    "evaluation.retrieval": ["Ranker"],
    "modeling.encoder": ["Encoder"],
    "modeling.losses": ["LossSet"],
    "modeling.memory": ["ClusterMemory", "InstanceMemory"],
    "pseudo_labels.dbscan": ["DBSCANLabels"],
    "pseudo_labels.kmeans": ["KMeansLabels"],
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in CLASSES for name in CLASSES[module]])
def test_example(module, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an example may write a file
    home = importlib.import_module(f"fastreid_uns.{module}")
    kind = getattr(home, name)
    (example,) = doctest.DocTestFinder(recurse=False).find(kind, name, home, vars(home))
    assert example.examples, f"{name} has no example"
    said: list[str] = []
    found = doctest.DocTestRunner().run(example, out=said.append)
    assert found.failed == 0, "".join(said)


def test_every_example_is_run():
    written = {
        (".".join(file.relative_to(PACKAGE).with_suffix("").parts), node.name)
        for file in PACKAGE.glob("**/*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ">>>" in (ast.get_docstring(node) or "")
    }
    assert written == {(module, name) for module in CLASSES for name in CLASSES[module]}
