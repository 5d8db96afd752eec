"""Write the encoder of a run as ONNX: pixels in 0..1 go in, features of unit length come out, for any batch size."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fastreid_uns.commands import finished
from fastreid_uns.errors import InvalidState

BATCHES = (1, 2, 5)  # sizes at which the exported file is compared with the encoder


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", help="checkpoint, or OUTPUT_DIR of a run")
    parser.add_argument(
        "output", type=Path, nargs="?", help="file to write (default: encoder.onnx beside the checkpoint)"
    )
    parser.add_argument("--opset", type=int, default=18, help="version of the ONNX operators (default: %(default)s)")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="largest difference of a feature that is accepted"
    )
    parser.add_argument("--plugins", action="append", default=[], metavar="FOLDER", help="plugin folder of the run")
    return parser.parse_args(arguments)


def require_onnx() -> None:
    """
    Raises:
        RuntimeError: a package that the export needs is not installed.
    """
    from importlib.util import find_spec

    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise InvalidState(
            f"export: {', '.join(missing)} is not installed; onnx, onnxscript and onnxruntime are needed. Run "
            f"pip install 'fastreid_uns[export]'."
        )


def export(extractor, output: Path, opset: int) -> None:
    """Write the encoder with a free batch size, in one file."""
    import torch

    class Features(torch.nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.encoder = encoder

        def forward(self, images):
            return self.encoder(images).feats

    output.parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        Features(extractor.encoder).eval(),
        (torch.rand(2, 3, *extractor.size),),
        str(output),
        input_names=["images"],
        output_names=["feats"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
        opset_version=opset,
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def largest_difference(extractor, file: Path) -> float:
    """Largest difference between a feature of the file and of the encoder, over random images.

    Raises:
        RuntimeError: the network is exported for one batch size only.
    """
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    batch = session.get_inputs()[0].shape[0]
    if isinstance(batch, int):
        raise InvalidState(
            f"export: the network fixes the batch at {batch} images, it should be free. Where its code takes the "
            f"batch size as len(tensor), write tensor.shape[0]."
        )
    largest = 0.0
    for count in BATCHES:
        images = torch.rand(count, 3, *extractor.size, generator=torch.Generator().manual_seed(count))
        found = torch.from_numpy(session.run(["feats"], {"images": images.numpy()})[0])
        largest = max(largest, (found - extractor(images)).abs().max().item())
    return largest


def checked_difference(extractor, file: Path, tolerance: float) -> float:
    """
    Raises:
        RuntimeError: file and encoder disagree by more than the tolerance.
    """
    difference = largest_difference(extractor, file)
    if not difference <= tolerance:
        raise InvalidState(
            f"export: features of the ONNX file differ by {difference:.1e}; {tolerance:.1e} is accepted. Try another "
            f"--opset, or raise --tolerance if you know why."
        )
    return difference


def description(extractor, difference: float) -> dict[str, object]:
    """What a program that uses the file must know."""
    import torch
    import yaml

    from fastreid_uns.utils.environment import environment

    found = environment(torch.device("cpu"))
    return {
        "input": {
            "name": "images",
            "shape": ["batch", 3, *extractor.size],
            "type": "float32",
            "colours": "RGB",
            "range": [0.0, 1.0],
            "normalisation": "inside",
            "resize": "bicubic",
        },
        "output": {"name": "feats", "shape": ["batch", extractor.dim], "type": "float32", "length": 1.0},
        "largest_difference": difference,
        "versions": {name: found[name] for name in ("fastreid_uns", "commit", "torch")},
        "config": yaml.safe_load(extractor.config),
    }


def run(arguments: argparse.Namespace) -> None:
    require_onnx()
    from fastreid_uns.predictor import FeatureExtractor, find_checkpoint

    weights = find_checkpoint(arguments.weights)
    output = arguments.output or Path(weights).with_name("encoder.onnx")
    extractor = FeatureExtractor.from_checkpoint(weights, plugins=arguments.plugins, device="cpu")
    export(extractor, output, arguments.opset)
    try:
        difference = checked_difference(extractor, output, arguments.tolerance)
    except RuntimeError:
        output.unlink()  # nobody shall use it
        raise
    sidecar = output.with_suffix(".json")
    sidecar.write_text(json.dumps(description(extractor, difference), indent=2) + "\n", encoding="utf-8")
    height, width = extractor.size
    print(
        f"{output}: {height}x{width} RGB in 0..1 -> {extractor.dim} features, batch free; largest difference "
        f"to torch {difference:.1e}; {sidecar}"
    )


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return finished(run, args)
