"""What the READMEs say is so: examples run, commands parse, links lead to files, tables are complete."""

from __future__ import annotations

import argparse
import ast
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
import yaml

from fastreid_uns import DefaultTrainer, hook, registry
from fastreid_uns.commands import COMMANDS
from fastreid_uns.commands import main as run_command_line
from fastreid_uns.config import load_config, renames
from fastreid_uns.defaults import DEFAULTS
from fastreid_uns.registry import DATASET_REGISTRY, META_ARCH_REGISTRY

ROOT = Path(__file__).parents[1]
ROOT_README = ROOT / "README.md"
GUIDE = ROOT / "projects/README.md"
READMES = sorted(
    {
        ROOT_README,
        ROOT / "DEPLOY.md",
        *ROOT.glob("*/README.md"),
        *ROOT.glob("projects/*/README.md"),
        ROOT / "tools/benchmark/README.md",
    }
)
DETECTRON2 = "## Coming from detectron2\n"
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


def prose_of(file: Path) -> str:
    """Text without code blocks and without the words of detectron2."""
    text = FENCE.sub("", file.read_text(encoding="utf-8"))
    before, heading, rest = text.partition(DETECTRON2)
    table, mark, after = rest.partition("\n## ")
    return before + heading + re.sub(r"^\| [^|]+ \|", "| |", table, flags=re.MULTILINE) + mark + after


def shell_lines(file: Path) -> Iterator[list[str]]:
    """Words of each command in the shell blocks."""
    for language, _, content in FENCE.findall(file.read_text(encoding="utf-8")):
        if language in ("bash", "sh", "console"):
            for line in content.replace("\\\n", " ").splitlines():
                if words := shlex.split(line.removeprefix("$ "), comments=True):
                    yield words


class Parsed(BaseException):
    """A command line was accepted; carries the namespace."""


def parse(start: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Start a command up to where its arguments are parsed; a usage error is a SystemExit."""

    def stopping(method: Callable) -> Callable:
        def parse_and_stop(self, args=None, namespace=None):
            found = method(self, args, namespace)
            if self.prog == "fastreid-uns":  # it has read the name of the subcommand alone
                return found
            raise Parsed(found)

        return parse_and_stop

    with monkeypatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))
        patch.setattr(sys, "path", [str(ROOT / "tools/benchmark"), *sys.path])
        with pytest.raises(Parsed) as stopped:
            start()
    return stopped.value.args[0]


def parse_line(words: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace | None:
    """The arguments of `fastreid-uns ...`, `-m fastreid_uns.commands ...` or `tools/X.py ...`; None for other lines."""
    for place, word in enumerate(words):
        rest = words[place + 1 :]
        if word in ("fastreid-uns", "fastreid_uns.commands"):
            return parse(lambda arguments=rest: run_command_line(arguments), monkeypatch)
        if word.startswith("tools/"):
            assert (ROOT / word).is_file(), f"{word} does not exist"
            monkeypatch.setattr(sys, "argv", [word, *rest])
            return parse(lambda tool=word: runpy.run_path(str(ROOT / tool), run_name="__main__"), monkeypatch)
    return None


def made_files(file: Path) -> set[str]:
    """Configs that a README makes itself: YAML blocks that begin with a name, and what `new-project` would write."""
    text = file.read_text(encoding="utf-8")
    named = set(re.findall(r"^```yaml.*\n# (\S+\.yaml)$", text, re.MULTILINE))
    return named | {f"projects/{name}/configs/synthetic.yaml" for name in re.findall(r"new-project (\w+)$", text, re.M)}


@pytest.mark.parametrize("file", READMES, ids=name_of)
def test_commands_parse(file, monkeypatch):
    made = made_files(file)
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = re.findall(r'^        "([\w-]+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE)
    for words in shell_lines(file):
        if words[0] == "make":
            assert set(words[1:]) <= set(targets), f"no such target: {words}"
        for named in re.findall(r"\.\[([\w,-]+)\]", " ".join(words)):
            assert set(named.split(",")) <= set(extras), f"no such extra: {words}"
        options = parse_line(words, monkeypatch)
        for config in [getattr(options, "config_file", None), *getattr(options, "configs", [])]:
            if config and config not in made:
                load_config(ROOT / config, getattr(options, "opts", None) or getattr(options, "overrides", []))


def test_a_wrong_command_line_is_noticed(monkeypatch):
    assert parse_line(["fastreid-uns", "search", "query", "i", "a.jpg"], monkeypatch).images == [Path("a.jpg")]
    assert parse_line(["python", "-m", "pytest"], monkeypatch) is None
    for words in (["fastreid-uns", "trian"], ["fastreid-uns", "train", "--config", "a", "--gpus", "2"]):
        with pytest.raises(SystemExit):
            parse_line(words, monkeypatch)


def test_every_command_is_in_the_readmes():
    lines = [words for file in READMES for words in shell_lines(file) if words[0] == "fastreid-uns"]
    shown = {words[1] for words in lines} | set(re.findall(r"`fastreid-uns ([a-z-]+)", ROOT_README.read_text()))
    assert set(COMMANDS) - {"compare", "convert"} <= shown
    assert shown <= set(COMMANDS)


@pytest.fixture(scope="module")
def keys() -> set[str]:
    """Every word that can be part of a key of a config, of all projects."""
    importlib.import_module("fastreid_uns.builtin")
    for project in ROOT.glob("projects/*/__init__.py"):
        importlib.import_module(f"fastreid_uns.projects.{project.parent.name}")
    importlib.import_module("fastreid_uns.projects.ACFL.camera")
    kinds = [value for value in vars(registry).values() if isinstance(value, registry.Registry)]
    words = {key.upper() for kind in kinds for name, _ in kind for key in kind.schema(name)}
    return words | {word for kind in kinds for word in kind.reserved} | set(words_of(DEFAULTS)) | {"NAME"}


def words_of(tree: dict) -> Iterator[str]:
    for key, value in tree.items():
        yield key
        if isinstance(value, dict):
            yield from words_of(value)


@pytest.mark.parametrize("file", READMES, ids=name_of)
def test_keys_exist(file, keys):
    blocks = " ".join(content for *_, content in FENCE.findall(file.read_text(encoding="utf-8")))
    known = keys | set(re.findall(r"\b([A-Z][A-Z_]+):", blocks))  # an example may bring a key of its own
    prose = prose_of(file)
    sections = "|".join(key for key, value in DEFAULTS.items() if isinstance(value, dict))
    unknown = [word for word in re.findall(r"`\.?([A-Z0-9]+_[A-Z0-9_]+)(?=[`: ])", prose) if word not in known]
    for text in re.findall(rf"`((?:{sections})\.[\w.]+)", prose):
        section, first, *rest = text.split(".")
        if section not in ("HOOKS", "PSEUDO_LABELS", "PAPER") and first not in DEFAULTS[section]:
            unknown += [] if section == "MODEL" and first in keys else [text]
        unknown += [text for word in [first, *rest] if word.isupper() and word not in known]
    assert set(unknown) <= {"OUTPUT_DIR", "MSMT17_V1"} | registries()


def registries() -> set[str]:
    return {name for name, value in vars(registry).items() if isinstance(value, registry.Registry)}


def test_the_changelog_names_what_was_renamed():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    values = [(str(old), new) for names in renames.VALUES.values() for old, new in names.items()]
    missing = [
        old
        for old, new in [*renames.KEYS.items(), *values]
        if not re.search(rf"^\|.*`{re.escape(old)}`.*\|.*{new.split('.')[-1]}`", text, re.M | re.I)  # true is True
    ]
    assert not missing
    assert set(renames.GONE) <= set(re.findall(r"`([A-Z.]+)`", text))


def definitions(file: Path) -> set[str]:
    """Names of a module, `Class.method` among them."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


@pytest.mark.parametrize("file", sorted(ROOT.glob("projects/*/README.md")), ids=name_of)
def test_tables_lead_to_the_code(file):
    rows = re.findall(r"`([\w/]+\.py)`(?:, `([\w.]+)`)?(?:, `([\w.]+)`)?", file.read_text(encoding="utf-8"))
    assert rows
    for name, *inside in rows:
        places = [folder / name for folder in (file.parent, ROOT / "projects", ROOT / "fastreid_uns")]
        code = next((place for place in places if place.is_file()), None)
        assert code, f"{name} is in none of {', '.join(map(name_of, {p.parent for p in places}))}"
        words = [word for word in inside if word and not word.isupper() and not word.endswith(".py")]
        assert set(words) <= definitions(code), f"{name} does not define all of {words}"


@pytest.mark.parametrize("file", READMES, ids=name_of)
def test_python_that_is_shown_can_be_imported(file):
    for language, rest, content in FENCE.findall(file.read_text(encoding="utf-8")):
        if language == "python" and "title=" not in rest:
            compile(content, str(file), "exec")
            for line in re.findall(r"^(?:from|import) .+$", content, re.MULTILINE):
                names: dict[str, object] = {}
                exec(line, names)
                assert len(names) > 1, f"{line} gives no name"  # besides the built-in ones


def test_what_a_detectron2_user_types_is_there():
    whole = GUIDE.read_text(encoding="utf-8").partition(DETECTRON2)[2].partition("\n## ")[0]
    table = prose_of(GUIDE).partition(DETECTRON2)[2].partition("\n## ")[0]
    imports = re.findall(r"`from (fastreid_uns[\w.]*) import ([\w, ]+)`", table)
    assert imports
    for module, names in imports:
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name), f"{module} has no {name}"
    kinds = {"DefaultTrainer": DefaultTrainer, "HookBase": hook.HookBase, "trainer": DefaultTrainer}
    for kind, name in re.findall(r"`(DefaultTrainer|HookBase|trainer)\.(\w+)", table):
        known = hasattr(kinds[kind], name) or f"        {name}:" in (DefaultTrainer.__mro__[1].__doc__ or "")
        assert known, f"{kind} has no {name}"
    builders = {name for name in vars(DefaultTrainer) if name.startswith("build_")}
    assert builders == set(re.findall(r"`(build_\w+)`", table))
    moments = {name for name in vars(hook.HookBase) if name.startswith(("before_", "after_"))}
    assert moments == set(re.findall(r"`((?:before|after)_\w+)`", whole))


@pytest.mark.parametrize("file", READMES, ids=name_of)
def test_configs_that_are_shown_load(file, tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for language, rest, content in FENCE.findall(file.read_text(encoding="utf-8")):
        if language == "yaml" and "title=" not in rest:
            (tmp_path / "shown.yaml").write_text(content)
            cfg = load_config(tmp_path / "shown.yaml")
            assert set(yaml.safe_load(content)) - {"_BASE_"} <= set(cfg)


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
    assert registries() == set(re.findall(r"^\| `(\w+_REGISTRY)` \|", GUIDE.read_text(), re.MULTILINE))


def test_orders_of_the_hooks_stand_in_the_guide():
    from fastreid_uns.engine import agreement, hooks, profiling, recluster

    kinds = [kind for module in (agreement, hooks, profiling, recluster) for kind in vars(module).values()]
    orders = {
        (str(kind.order), kind.__name__)
        for kind in kinds
        if isinstance(kind, type) and issubclass(kind, hook.HookBase) and kind is not hook.HookBase
    }
    assert orders == set(re.findall(r"^\| (\d+) \| `(\w+)` \|", GUIDE.read_text(), re.MULTILINE))


def test_the_loss_inputs_stand_in_the_guide():
    from fastreid_uns.modeling.meta_arch import build_model
    from fastreid_uns.structures import Batch

    cfg = load_config(
        overrides=["MODEL.BACKBONE.NAME", "SmallNet", "MODEL.MOMENTUM_ENCODER", "true", "MODEL.HEAD.NAME", "PartHead"]
    )
    model = build_model(cfg, 4)
    assert isinstance(model, META_ARCH_REGISTRY.get("Baseline"))
    inputs: dict = {}
    model.losses.forward = lambda found: inputs.update(found) or {}
    model.memory.features = torch.zeros(2, model.encoder.dim)
    zeros = torch.zeros(2, dtype=torch.int64)
    model(Batch((torch.zeros(2, 3, 256, 128),), zeros, zeros, zeros, zeros))
    text = re.search(r"^\*\*Losses\.\*\*.*?\. A loss that", GUIDE.read_text(), re.MULTILINE | re.DOTALL)[0]
    assert set(inputs) == set(re.findall(r"`([a-z_]+)`", text))


def test_the_readme_says_how_make_runs_the_tests():
    command = re.search(r"^test:.*\n\t\$\(BIN\)/(.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert f"`{command}`" in (ROOT / "README.md").read_text()
