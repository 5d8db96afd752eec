"""The network that photos start from."""

from __future__ import annotations

import torch

from fastreid_uns.modeling.backbones.timm_net import TimmBackbone
from fastreid_uns.modeling.encoder import Encoder
from fastreid_uns.modeling.heads import PooledHead
from fastreid_uns.modeling.norm import freeze_norm_statistics
from fastreid_uns.modeling.weights import load_weights

MODEL = "tf_efficientnet_lite0"
DIM = 256  # of the features


def pretrained_encoder(size: tuple[int, int], *, model: str = MODEL, weights: str = "imagenet") -> Encoder:
    """An encoder whose features are worth grouping before any training; its norm layers keep their statistics.

    Args:
        size: height and width in pixels.
        model: name in timm, or `hf-hub:user/name`.
        weights: as `MODEL.WEIGHTS`; mean and standard deviation are those that timm states for the model.

    Raises:
        UserError: see `TimmBackbone` and `load_weights`.
    """
    torch.manual_seed(0)  # what the weights do not cover is equal in every run
    stated = TimmBackbone.pretrained_input({"MODEL": model})
    backbone = TimmBackbone(size, model=model)
    encoder = Encoder(backbone, PooledHead(backbone.out_channels, dim=DIM), mean=stated["MEAN"], std=stated["STD"])
    load_weights(encoder, weights)
    freeze_norm_statistics(encoder)
    return encoder.eval()
