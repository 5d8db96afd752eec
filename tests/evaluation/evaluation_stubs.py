"""Images in memory and a small model, for the tests of evaluation."""

from __future__ import annotations

import torch
from torch import nn

from fastreid_uns.structures import Record, ReIDData


class Images:
    """Stands in for an ImageSet."""

    def __init__(self, pixels):
        self.pixels = pixels
        self.paths = [f"image_{i}.jpg" for i in range(len(pixels))]
        self.asked = []

    def __len__(self):
        return len(self.pixels)

    def stream(self, batches, device):
        for batch in batches:
            self.asked.append(list(batch))
            yield self.pixels[list(batch)].to(device)


class Model(nn.Module):
    """Convolution, norm, mean over the image; unit length."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout()

    def extract(self, images):
        feature_map = self.drop(self.norm(self.conv(images.float() / 255)))
        feats = nn.functional.normalize(feature_map.flatten(2).mean(2).float(), dim=1)
        return {"feats": feats, "parts": feature_map[:, :2, 0], "brightest": images.amax((1, 2, 3)).long()}


def reid_task(queries=9, gallery=23):
    """(data, images) of a task with 4 identities and 3 cameras."""
    generator = torch.Generator().manual_seed(0)
    count = queries + gallery
    pixels = torch.randint(0, 256, (count, 3, 8, 6), generator=generator).to(torch.uint8)
    cameras = torch.randint(0, 3, (count,), generator=generator).tolist()
    records = [Record(f"{i}.jpg", i % 4, cameras[i]) for i in range(count)]
    return ReIDData([], records[:queries], records[queries:], "cross_camera"), Images(pixels)
