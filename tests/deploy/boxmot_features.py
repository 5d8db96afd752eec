"""Run by the Python that has BoxMOT: features of crops by its ReID backend for ONNX, as its trackers call it.

    python boxmot_features.py FILE.onnx CROPS.npz FEATURES.npy

CROPS.npz holds `image` (H,W,3) uint8 BGR and `boxes` (B,4) left, top, right, bottom.
"""

import sys

import numpy as np
from boxmot.reid.core.runtime import ReID

if __name__ == "__main__":
    weights, crops, output = sys.argv[1:]
    given = np.load(crops)
    np.save(output, ReID(weights, device="cpu").model.get_features(given["boxes"], given["image"]))
