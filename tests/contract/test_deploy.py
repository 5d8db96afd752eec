"""A run of every project can be evaluated, loaded, exported, searched and shown, and all give the same features."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastreid_uns.commands import export, report, search, train
from fastreid_uns.config import load_config
from fastreid_uns.data.image_set import ImageSet
from fastreid_uns.engine.default import DefaultTrainer
from fastreid_uns.engine.hooks import EvaluateHook
from fastreid_uns.engine.launch import default_argument_parser
from fastreid_uns.predictor import FeatureExtractor
from fastreid_uns.registry import DATASET_REGISTRY
from fastreid_uns.structures import ReIDData

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(ROOT.glob("projects/*/configs/synthetic*.yaml"))
RUNS = {f"{file.parents[1].name}-{file.stem}": file for file in CONFIGS}
RUNS["ACFL-vit"] = ROOT / "projects/ACFL/configs/market_vit.yaml"
RUNS["own-set"] = ROOT / "configs/quickstart.yaml"

SAME = ["Best", "CAJ", "CAP", "ICE", "ICL", "ISE", "MMT", "O2CAP", "SpCL", "TMP"]
SAME = [f"{project}-synthetic" for project in SAME]
SAME += ["MMT-synthetic_source", "NCPLR-synthetic_plain", "SpCL-synthetic_uda", "TransReIDSSL-synthetic_source"]
# what these export is the graph of ACFL's encoder, or of TransReIDSSL's, with other numbers
EXPORTS = [pytest.param(name, marks=pytest.mark.slow if name in SAME else ()) for name in RUNS]

CLOSE = {"rtol": 0.0, "atol": 1e-5}  # the same sums in batches of other sizes
AS_EXPORTED = {"rtol": 0.0, "atol": 1e-4}  # another program adds in another order; what the export command accepts

VIT = {"NAME": "ViT", "WIDTH": 32, "DEPTH": 2, "HEADS": 2, "PATCH": 16, "CONV_STEM": True, "PART_TOKENS": 3}


class OneRun(NamedTuple):
    folder: Path
    config: Path  # as the user would have it, complete
    results: dict[str, dict[str, float]]
    paths: list[str]  # of the images that were evaluated
    feats: Tensor  # of these, as the evaluator ranked them


@pytest.fixture(scope="module")
def own_set(tiny_set):
    """Config section of a data set that is registered by the program itself, by no plugin."""

    @DATASET_REGISTRY.register()
    def set_of_a_script(*, root: str) -> ReIDData:
        return DATASET_REGISTRY.build({**tiny_set, "ROOT": root})

    yield {"NAME": "set_of_a_script", "ROOT": tiny_set["ROOT"]}
    del DATASET_REGISTRY._obj_map["set_of_a_script"]


@pytest.fixture(scope="module", params=RUNS, ids=str)
def run(request, shrink, tiny_set, own_set, tmp_path_factory) -> OneRun:
    """One epoch of two steps."""
    own = {
        "ACFL-vit": {"MODEL__BACKBONE": VIT, "MODEL__GHOST_BATCH": 8},
        "own-set": {"DATASETS__TRAIN": own_set, "DATASETS__TESTS__synthetic": own_set},
    }
    folder = tmp_path_factory.mktemp("deploy")
    changes = shrink(
        RUNS[request.param],
        tiny_set,
        16,
        **own.get(request.param, {}),
        SOLVER__EPOCHS=1,
        SOLVER__ITERS_PER_EPOCH=2,
        OUTPUT_DIR=str(folder / "run"),
    )
    trainer = DefaultTrainer(load_config(RUNS[request.param], changes))
    (evaluator,) = trainer.hook(EvaluateHook).evaluators.values()
    ranked, score = {}, evaluator.score
    evaluator.score = lambda query, gallery: ranked.update(feats=torch.cat([query, gallery])) or score(query, gallery)
    trainer.train()
    file = folder / "run/config.yaml"
    return OneRun(folder / "run", file, trainer.results, evaluator.images.paths, ranked["feats"])


def test_evaluation_gives_the_scores_of_training(run):
    arguments = default_argument_parser().parse_args(["--config-file", str(run.config), "--eval-only"])
    assert train.run(arguments) == run.results


def test_the_predictor_gives_the_features_that_were_ranked(run):
    extractor = FeatureExtractor.from_checkpoint(run.folder, device="cpu", batch_size=7)
    torch.testing.assert_close(extractor(run.paths), run.feats, **CLOSE)


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs the packages of the extra export",
)
@pytest.mark.parametrize("run", EXPORTS, indirect=True)
def test_the_exported_file_gives_the_features_that_were_ranked(run, tmp_path):
    import onnxruntime

    assert export.main([str(run.folder), str(tmp_path / "encoder.onnx")]) == 0
    images = ImageSet([], tuple(load_config(run.config).INPUT.SIZE))
    images.paths = run.paths
    pixels = torch.stack([images[i] for i in range(len(run.paths))]) / 255
    (feats,) = onnxruntime.InferenceSession(str(tmp_path / "encoder.onnx")).run(None, {"images": pixels.numpy()})
    torch.testing.assert_close(torch.from_numpy(feats), run.feats, **AS_EXPORTED)


def test_what_is_exported_in_slow_tests_only_is_built_as_what_is_always():
    built = {name: load_config(file).MODEL for name, file in RUNS.items()}
    encoders = {name: model.BACKBONE.dump() + model.HEAD.dump() for name, model in built.items()}
    assert {encoders[name] for name in SAME} <= {encoders["ACFL-synthetic"], encoders["TransReIDSSL-synthetic"]}


def test_search_finds_by_the_features_that_were_ranked(run, tmp_path, capsys):
    gallery = Path(run.paths[-1]).parent
    options = ["--device", "cpu"]
    weights = ["--weights", str(run.folder), "--workers", "0"]
    assert search.main(["build", str(gallery), str(tmp_path / "index"), *weights, *options]) == 0
    capsys.readouterr()
    assert search.main(["query", str(tmp_path / "index"), run.paths[0], "--top", "1", *options]) == 0
    _, similarity, found = capsys.readouterr().out.splitlines()[0].split(maxsplit=2)
    candidates = [i for i, path in enumerate(run.paths) if Path(path).parent == gallery]
    expected = run.feats[candidates] @ run.feats[0]
    assert float(similarity) == pytest.approx(expected.max().item(), abs=1e-4)
    assert expected[[run.paths[i] for i in candidates].index(found)] == pytest.approx(float(similarity), abs=1e-4)


def test_the_report_shows_the_scores_of_training(run, tmp_path):
    pytest.importorskip("matplotlib")
    few = ["--queries", "1", "--top", "2", "--clusters", "2", "--members", "2", "--device", "cpu"]
    assert report.main([str(run.folder), "--output", str(tmp_path), *few]) == 0
    page = (tmp_path / "index.html").read_text()
    (scores,) = run.results.values()
    assert re.search(rf"mAP {scores['mAP']:.2f}\b", page)
    assert "clusters of the last clustering" in page
