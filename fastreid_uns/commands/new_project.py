"""Write the folder of a new project: one component, a config that trains at once, a test, a README."""

from __future__ import annotations

import argparse
import keyword
import os
from collections.abc import Sequence
from pathlib import Path

from fastreid_uns.commands import finished
from fastreid_uns.errors import InvalidState, InvalidValue
from fastreid_uns.utils.places import path_of, shipped_root

ROOT = shipped_root()
QUICKSTART = "configs/quickstart.yaml"  # found among the configs that ship

INIT = """\
from . import losses as losses
"""

LOSSES = '''\
"""The loss of @NAME@."""

from __future__ import annotations

from torch import Tensor, nn

from fastreid_uns.errors import InvalidValue
from fastreid_uns.registry import LOSS_REGISTRY
from fastreid_uns.utils.comm import all_gather, all_gather_with_gradient


@LOSS_REGISTRY.register()
class @NAME@Loss(nn.Module):
    """Pushes images of different clusters apart, so that clusters spread over the whole sphere.

    Args:
        sharpness: how fast the push fades with the squared distance, > 0.

    Raises:
        ValueError: sharpness out of range.

    Source: Wang and Isola 2020, uniformity; differs: pairs of different clusters only, and no logarithm around the
        mean, so that a batch of one cluster costs nothing.
    """

    def __init__(self, *, sharpness: float = 2.0) -> None:
        super().__init__()
        if sharpness <= 0:
            raise InvalidValue(f"@NAME@Loss: SHARPNESS is {sharpness}; a number above 0 is accepted.")
        self.sharpness = sharpness

    def forward(self, feats: Tensor, labels: Tensor) -> Tensor:
        """Scalar in [0, 1]; feats (B,D) unit length, labels (B,)."""
        feats = all_gather_with_gradient(feats.float())  # the batch of all processes
        labels = all_gather(labels, equal=True)
        apart = labels[:, None] != labels[None]
        squared_distance = 2.0 - 2.0 * feats @ feats.T
        push = (-self.sharpness * squared_distance).exp() * apart
        return push.sum() / apart.sum().clamp_min(1)
'''

CONFIG = """\
# @NAME@ on generated images: two or three minutes on two CPU cores.
_BASE_: @BASE@
PLUGINS: [@PLUGIN@]
MODEL:
  LOSSES:
    spread: {NAME: @NAME@Loss, WEIGHT: 0.1, SHARPNESS: 2.0}
OUTPUT_DIR: output/@NAME@
"""

TEST = '''\
"""What the parts of @NAME@ promise, on tensors small enough to work by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fastreid_uns.config import load_config
from fastreid_uns.registry import LOSS_REGISTRY

CONFIG = Path(__file__).parents[1] / "configs/synthetic.yaml"


@pytest.fixture
def loss():
    return LOSS_REGISTRY.build(load_config(CONFIG).MODEL.LOSSES.spread)


def test_config_sets_the_loss(loss):
    assert (type(loss).__name__, loss.sharpness) == ("@NAME@Loss", 2.0)


def test_value_worked_by_hand(loss):
    feats = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 1])
    # squared distances between the clusters: 2 and 4 for each image of cluster 0
    expected = (math.exp(-2 * 2) + math.exp(-2 * 4)) / 2
    assert loss(feats, labels).item() == pytest.approx(expected, rel=1e-6)


def test_a_step_against_the_gradient_pushes_clusters_apart(loss):
    feats = torch.tensor([[0.8, 0.6], [1.0, 0.0]], requires_grad=True)
    loss(feats, torch.tensor([0, 1])).backward()
    moved = torch.nn.functional.normalize(feats - feats.grad)
    assert (moved[0] @ moved[1]).item() < 0.8


def test_one_cluster_costs_nothing(loss):
    assert loss(torch.eye(3), torch.zeros(3, dtype=torch.int64)) == 0.0


def test_sharpness_out_of_range():
    with pytest.raises(ValueError, match="SHARPNESS is 0"):
        LOSS_REGISTRY.get("@NAME@Loss")(sharpness=0)
'''

README = """\
# @NAME@

**Source**: authors, *title*, venue and year. State here what of it is reproduced.

```bash
fastreid-uns train --config-file @FOLDER@/configs/synthetic.yaml
python -m pytest @FOLDER@
```

## From the paper to the code

| paper | code |
|---|---|
| Wang and Isola 2020, uniformity: mean of exp(-t d^2) over pairs | `losses.py`, `@NAME@Loss.forward` |

## Settings

| paper | key | value |
|---|---|---|
| t | `MODEL.LOSSES.spread.SHARPNESS` | 2.0 |
| weight of the loss | `MODEL.LOSSES.spread.WEIGHT` | 0.1 |

## Deviations

* Only pairs of different clusters count, without a logarithm around the mean: a batch of one cluster costs nothing.

## Results

| config | mAP | rank1 | seeds | hardware | commit | hours |
|---|---|---|---|---|---|---|
| `synthetic.yaml` | to be filled | | | | | |
"""

FILES = {
    "__init__.py": INIT,
    "losses.py": LOSSES,
    "configs/synthetic.yaml": CONFIG,
    "tests/test_@NAME@.py": TEST,
    "README.md": README,
}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line of `new-project`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", metavar="NAME", help="of the project, a Python name such as MyPaper")
    parser.add_argument(
        "--into", type=path_of, help="folder to write it into (default: projects of the checkout, else this folder)"
    )
    return parser.parse_args(arguments)


def write_project(name: str, into: Path | None) -> Path:
    """The folder `into/name`, complete.

    Raises:
        ValueError: the name is none that Python can import.
        FileExistsError: the folder is there already.
    """
    from fastreid_uns.commands.output import write_output

    if not name.isidentifier() or keyword.iskeyword(name):
        raise InvalidValue(f"{name!r} is no Python name; letters, digits and _ are accepted. Choose such as MyPaper.")
    into = into or (ROOT / "projects" if in_checkout() else Path.cwd())
    folder = into.resolve() / name
    if folder.exists():
        raise InvalidState(f"{shown(folder)} exists; nothing was written. Choose another name, or delete it.")
    inside = in_checkout() and folder.parent == ROOT / "projects"
    base = os.path.relpath(ROOT / QUICKSTART, folder / "configs") if in_checkout() else QUICKSTART
    words = {
        "@NAME@": name,
        "@FOLDER@": shown(folder),
        "@BASE@": base,
        "@PLUGIN@": f"fastreid_uns.projects.{name}" if inside else "..",
    }
    for file, text in FILES.items():
        for word, value in words.items():
            file, text = file.replace(word, value), text.replace(word, value)
        write_output(folder / file, text.encode())
    return folder


def in_checkout() -> bool:
    """Whether the package is used from its checkout; an installed one is no place for projects of one's own."""
    return (ROOT / "projects/README.md").is_file()


def shown(path: Path) -> str:
    """The path as it is typed from the checkout."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def main(arguments: Sequence[str] | None = None) -> int:
    """See `commands.main`."""
    return finished(run, parse_arguments(arguments))


def run(options: argparse.Namespace) -> None:
    folder = shown(write_project(options.name, options.into))
    print(f"wrote {folder}; next:")
    print(f"  fastreid-uns train --config-file {folder}/configs/synthetic.yaml")
    print(f"  python -m pytest {folder}")
    print(f"then replace the loss in {folder}/losses.py by your method; projects/README.md tells how.")
