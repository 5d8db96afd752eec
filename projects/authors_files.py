"""Files of weights as authors write them, for the tests of the projects that read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastreid_uns.modeling.encoder import Encoder
from fastreid_uns.modeling.weights import WeightReport, load_weights

KINDS = ("converted", "dino", "supervised", "unsupervised")


def load(encoder: Encoder, content: object, folder: Path, **keys: Any) -> WeightReport:
    """Write a file of weights and load it; `keys` are those of `load_weights`."""
    torch.save(content, folder / "weights.pth")
    return load_weights(encoder, str(folder / "weights.pth"), **keys)


def renamed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The same tensors with a prefix before their names."""
    return {prefix + name: value for name, value in state.items()}


def body(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A network without its necks, by the names of TransReID."""
    return {name: value for name, value in state.items() if not name.startswith("bottleneck")}


def transreid_file(kind: str, state: dict[str, Tensor]) -> dict[str, Any]:
    """What TransReID-SSL and PASS write.

    Args:
        kind: of `KINDS`: the network as their converter leaves it, the pre-training by DINO, or training with its
            necks, with or without labels.
        state: network and necks by the names of the training without labels.
    """
    network = body(state)
    necks = {name: value for name, value in state.items() if name not in network}
    if kind == "converted":
        return network
    if kind == "dino":
        head = {"head.mlp.0.weight": torch.ones(2), "head.last_layer.weight_v": torch.ones(2)}
        student = renamed({name: 0 * value for name, value in network.items()}, "module.backbone.")
        return {
            "teacher": renamed({**renamed(network, "backbone."), **head}, "module."),
            "student": student,
            "epoch": 100,
        }
    if kind == "supervised":
        numbered = {name.replace("bottleneck_pt", "bottleneck_"): value for name, value in necks.items()}
        return {**renamed(network, "base."), **numbered, "classifier.weight": torch.ones(3, 2)}
    return {"state_dict": renamed(state, "module."), "epoch": 50, "best_mAP": 0.9}
