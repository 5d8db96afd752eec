"""What the READMEs say is so: examples run, commands parse, links lead to files, tables are complete."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fastreid_uns import hook, registry
from fastreid_uns.config import load_config
from fastreid_uns.registry import DATASET_REGISTRY, META_ARCH_REGISTRY

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "projects/README.md"
READMES = sorted({ROOT / "README.md", *ROOT.glob("*/README.md"), *ROOT.glob("projects/*/README.md")})
FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def titled_blocks(file: Path) -> dict[str, str]:
    """File name → content of the blocks that are marked `title=FILE`."""
    found = {}
    for _, rest, content in FENCE.findall(file.read_text(encoding="utf-8")):
        if title := re.search(r"title=(\S+)", rest):
            found[title[1]] = content
    return found


def commands(file: Path) -> Iterator[list[str]]:
    """Words of each command in the shell blocks."""
    for language, _, content in FENCE.findall(file.read_text(encoding="utf-8")):
        if language in ("bash", "sh", "console"):
            for line in content.replace("\\\n", " ").splitlines():
                if words := shlex.split(line.removeprefix("$ "), comments=True):
                    yield words


class Parsed(BaseException):
    """A command line was accepted; carries the namespace."""


def parse(tool: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Run a tool up to where its arguments are parsed; a usage error is a SystemExit."""

    def stopping(method: Callable) -> Callable:
        def parse_and_stop(self, args=None, namespace=None):
            raise Parsed(method(self, args, namespace))

        return parse_and_stop

    with monkeypatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))
        patch.setattr(sys, "argv", [str(tool), *arguments])
        patch.setattr(sys, "path", [*sys.path])
        with pytest.raises(Parsed) as stopped:
            runpy.run_path(str(tool), run_name="__main__")
    return stopped.value.args[0]


def made_files(file: Path) -> set[str]:
    """Configs that a README makes itself: YAML blocks that begin with a name, and what new_project.py would write."""
    text = file.read_text(encoding="utf-8")
    named = set(re.findall(r"^```yaml.*\n# (\S+\.yaml)$", text, re.MULTILINE))
    return named | {
        f"projects/{name}/configs/synthetic.yaml" for name in re.findall(r"new_project\.py (\w+)$", text, re.M)
    }


@pytest.mark.parametrize("file", READMES, ids=name_of)
def test_commands_parse(file, monkeypatch):
    made = made_files(file)
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = re.findall(r'^        "(\w+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE)
    for words in commands(file):
        if words[0] == "make":
            assert set(words[1:]) <= set(targets), f"no such target: {words}"
        for named in re.findall(r"\.\[([\w,]+)\]", " ".join(words)):
            assert set(named.split(",")) <= set(extras), f"no such extra: {words}"
        for place, word in enumerate(words):
            if not word.startswith("tools/"):
                continue
            assert (ROOT / word).is_file(), f"{word} does not exist"
            options = parse(ROOT / word, words[place + 1 :], monkeypatch)
            config = getattr(options, "config_file", None)
            if config and config not in made:
                load_config(ROOT / config, options.opts if "opts" in options else options.overrides)


@pytest.mark.parametrize("file", READMES, ids=name_of)
def test_configs_that_are_shown_load(file, tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for language, rest, content in FENCE.findall(file.read_text(encoding="utf-8")):
        if language == "yaml" and "title=" not in rest:
            (tmp_path / "shown.yaml").write_text(content)
            load_config(tmp_path / "shown.yaml")


@pytest.mark.parametrize("file", READMES, ids=name_of)
def test_links_lead_to_files_and_headings(file):
    prose = FENCE.sub("", file.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = file.parent / path if path else file
        assert there.exists(), f"{target} leads nowhere"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", FENCE.sub("", there.read_text(encoding="utf-8")), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{target}: no such heading; there are {sorted(slugs)}"


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A copy of the checkout as far as the titled files of the guide need it, importable as projects."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name, content in titled_blocks(GUIDE).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    projects = importlib.import_module("fastreid_uns.projects")
    monkeypatch.setattr(projects, "__path__", [str(tmp_path / "projects")])
    before = set(sys.modules)
    yield tmp_path
    for module in set(sys.modules) - before:
        if module.startswith("fastreid_uns.projects."):
            del sys.modules[module]
    importlib.invalidate_caches()


def train(file: Path, tiny: list[str], changes: list[str]):
    from fastreid_uns.engine.default import DefaultTrainer

    trainer = DefaultTrainer(load_config(file, [*tiny, *changes]))
    trainer.train()
    assert trainer.epochs_done > 0
    return trainer


def test_the_paper_of_the_guide_trains_and_passes_its_test(checkout, tiny):
    trainer = train(checkout / "projects/Confident/configs/synthetic.yaml", tiny, ["PSEUDO_LABELS.K1=8"])
    assert 0 < trainer.metrics["confidence"] < 1
    for test in (checkout / "projects/Confident/tests").glob("test_*.py"):
        space: dict = {}
        exec(compile(test.read_text(), str(test), "exec"), space)
        functions = [value for name, value in space.items() if name.startswith("test_")]
        assert functions
        for function in functions:
            function()


def test_the_code_of_the_guide_is_clean(checkout):
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--config", str(ROOT / "pyproject.toml")]
    done = subprocess.run([*command, str(checkout / "projects")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_hook_of_the_guide_stops_the_run(checkout, tiny):
    changes = ["HOOKS.steady.AGREEMENT=-1", "SOLVER.EPOCHS=4"]
    trainer = train(checkout / "projects/Steady/configs/synthetic.yaml", tiny, changes)
    assert trainer.epochs_done == 2
    assert "agree with those of the epoch before" in trainer.stop_reason


def test_the_sources_of_the_guide_train(checkout, tiny, tiny_set):
    source = json.dumps({**tiny_set, "SEED": 1})
    batch = ["DATALOADER.SOURCE_SAMPLER.BATCH_SIZE=16", "DATALOADER.SOURCE_SAMPLER.NUM_INSTANCES=4"]
    file = checkout / "projects/Steady/configs/adapt.yaml"
    trainer = train(file, tiny, [f"DATASETS.SOURCES.drawn={source}", *batch])
    assert trainer.batch_size == 16 + 16
    assert len(trainer.model.memory.features) == 12 + trainer.metrics["clusters"]


def test_the_data_set_of_the_guide_loads_and_trains(checkout, tiny, tiny_set, tmp_path):
    data = DATASET_REGISTRY.build(tiny_set)
    for part, records in zip(("train", "query", "gallery"), data[:3], strict=True):
        for number, record in enumerate(records):
            file = tmp_path / "zoo" / part / f"animal{record.identity}" / f"{record.camera}_{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(record.path, file)
    tiny = [change for change in tiny if not change.startswith("DATASETS")]
    root = tmp_path / "zoo"
    changes = [f"DATASETS.TRAIN.ROOT={root}", f"DATASETS.TESTS.zoo.ROOT={root}"]
    trainer = train(checkout / "projects/Zoo/configs/zoo.yaml", tiny, changes)
    assert list(trainer.results) == ["zoo"]
    loaded = DATASET_REGISTRY.build({"NAME": "zoo", "ROOT": str(root)})
    assert [len(part) for part in loaded[:3]] == [len(part) for part in data[:3]]
    assert len({record.identity for record in loaded.train}) == 12
    with pytest.raises(FileNotFoundError, match="train holds no"):
        DATASET_REGISTRY.build({"NAME": "zoo", "ROOT": str(tmp_path)})


def test_every_registry_stands_in_the_guide():
    kinds = {name for name, value in vars(registry).items() if isinstance(value, registry.Registry)}
    assert kinds == set(re.findall(r"^\| `(\w+_REGISTRY)` \|", GUIDE.read_text(), re.MULTILINE))


def test_orders_of_the_hooks_stand_in_the_guide():
    from fastreid_uns.engine import hooks, recluster

    orders = {
        (str(kind.order), name)
        for name, kind in (vars(hooks) | vars(recluster)).items()
        if isinstance(kind, type) and issubclass(kind, hook.HookBase) and kind is not hook.HookBase
    }
    assert orders == set(re.findall(r"^\| (\d+) \| `(\w+)` \|", GUIDE.read_text(), re.MULTILINE))


def test_the_offer_to_losses_stands_in_the_guide():
    from fastreid_uns.modeling.meta_arch import build_model
    from fastreid_uns.structures import Batch

    cfg = load_config(
        overrides=["MODEL.BACKBONE.NAME", "SmallNet", "MODEL.MOMENTUM_ENCODER", "true", "MODEL.HEAD.NAME", "PartHead"]
    )
    model = build_model(cfg, 4)
    assert isinstance(model, META_ARCH_REGISTRY.get("Baseline"))
    offered: dict = {}
    model.losses.forward = lambda offer: offered.update(offer) or {}
    model.memory.features = torch.zeros(2, model.encoder.dim)
    zeros = torch.zeros(2, dtype=torch.int64)
    model(Batch((torch.zeros(2, 3, 256, 128),), zeros, zeros, zeros, zeros))
    text = re.search(r"^\*\*Losses\.\*\*.*?\. A loss that", GUIDE.read_text(), re.MULTILINE | re.DOTALL)[0]
    assert set(offered) == set(re.findall(r"`([a-z_]+)`", text))


def test_the_readme_says_how_make_runs_the_tests():
    command = re.search(r"^test:.*\n\t\$\(BIN\)/(.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert f"`{command}`" in (ROOT / "README.md").read_text()
