"""Write the encoder of a run as ONNX: RGB pixels go in, features of unit length come out, for any batch size."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

from fastreid_uns.commands import finished
from fastreid_uns.errors import InvalidState, InvalidValue
from fastreid_uns.utils.places import path_of

BATCHES = (1, 2, 5)  # sizes at which the exported file is compared with the encoder
NORMALISATIONS = ("inside", "outside", "imagenet")
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Normalisation(NamedTuple):
    """What becomes of pixels in 0..1 before the backbone sees them.

    Attributes:
        where: `inside` of the file, or `outside`: the program that uses the file subtracts `mean` and divides by `std`.
        mean, std: of each channel, RGB.
    """

    where: str
    mean: list[float]
    std: list[float]

    @classmethod
    def of(cls, extractor, name: str) -> Normalisation:
        """The one that `--normalisation` names; `imagenet` is outside, with the numbers that trackers have built in."""
        if name == "imagenet":
            return cls("outside", list(_IMAGENET_MEAN), list(_IMAGENET_STD))
        encoder = extractor.encoder
        mean, std = ([round(value, 6) for value in values.flatten().tolist()] for values in (encoder.mean, encoder.std))
        return cls(name, mean, std)

    def tensors(self):
        """`mean` and `std` as (1,3,1,1)."""
        import torch

        return [torch.tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std)]

    def apply(self, images):
        """(B,3,H,W) in 0..1 → what the file takes."""
        mean, std = self.tensors()
        return images if self.where == "inside" else (images - mean) / std


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line of `export`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", help="checkpoint, OUTPUT_DIR of a run, or hub:user/name")
    parser.add_argument(
        "output", type=path_of, nargs="?", help="file to write (default: encoder.onnx beside the checkpoint)"
    )
    parser.add_argument(
        "--normalisation",
        choices=NORMALISATIONS,
        default="inside",
        help="who subtracts the mean and divides by the standard deviation: inside = the file, it takes pixels in 0..1 "
        "(default); outside = who uses it, with the numbers of the network; imagenet = who uses it, with those of "
        "ImageNet, as trackers do, whatever the numbers of the network are",
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
    """Write the encoder with a free batch size, in one file.

    Raises:
        RuntimeError: it cannot be written in that version of the operators.
    """
    import logging

    import onnx
    import torch

    for name in ("torch.onnx", "onnxscript"):  # which warn, with tracebacks, and keep another version
        logging.getLogger(name).setLevel(logging.CRITICAL)

    class Features(torch.nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.encoder = encoder

        def forward(self, images):
            return self.encoder(images).feats

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
    held = next(entry.version for entry in onnx.load(str(output)).opset_import if entry.domain in ("", "ai.onnx"))
    if held != opset:
        raise InvalidState(
            f"export: this network cannot be written with --opset {opset}, only with {held}. Leave the flag out, or "
            f"choose a version nearer to {held}."
        )


def taking_normalised(extractor, normalisation: Normalisation):
    """An extractor whose encoder takes images as the file does: normalised already, unless that happens inside.

    Where the network wants other numbers than the images were normalised with, the rest stays in the encoder.
    """
    from copy import deepcopy

    from fastreid_uns.predictor import FeatureExtractor

    if normalisation.where == "inside":
        return extractor
    encoder = deepcopy(extractor.encoder)
    mean, std = normalisation.tensors()
    encoder.mean.copy_((encoder.mean - mean) / std)
    encoder.std.copy_(encoder.std / std)
    return FeatureExtractor(encoder, extractor.size, device="cpu")


def largest_difference(extractor, file: Path, normalisation: Normalisation | None = None) -> float:
    """Largest difference between a feature of the file and of the encoder, over random images.

    Args:
        normalisation: what the file was written with.

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
        given = images if normalisation is None else normalisation.apply(images)
        found = torch.from_numpy(session.run(["feats"], {"images": given.numpy()})[0])
        largest = max(largest, (found - extractor(images)).abs().max().item())
    return largest


def checked_difference(extractor, file: Path, tolerance: float, normalisation: Normalisation) -> float:
    """
    Raises:
        RuntimeError: file and encoder disagree by more than the tolerance.
    """
    difference = largest_difference(extractor, file, normalisation)
    if not difference <= tolerance:
        raise InvalidState(
            f"export: features of the ONNX file differ by {difference:.1e}; {tolerance:.1e} is accepted. Try another "
            f"--opset, or raise --tolerance if you know why."
        )
    return difference


def description(extractor, difference: float, normalisation: Normalisation) -> dict[str, object]:
    """What a program that uses the file must know.

    `range` is that of the pixels before mean and standard deviation, which the file applies if `normalisation` is
    `inside`; if it is `outside`, whoever uses the file does. `length` is that of each feature.
    """
    import torch
    import yaml

    from fastreid_uns.utils.environment import environment

    found = environment(torch.device("cpu"))
    return {
        "input": {
            "name": "images",
            "shape": ["batch", 3, *extractor.size],
            "size": list(extractor.size),
            "type": "float32",
            "colours": "RGB",
            "range": [0.0, 1.0],
            "normalisation": normalisation.where,
            "mean": normalisation.mean,
            "std": normalisation.std,
            "resize": "bicubic",
        },
        "output": {"name": "feats", "shape": ["batch", extractor.dim], "type": "float32", "length": 1.0},
        "largest_difference": difference,
        "versions": {name: found[name] for name in ("fastreid_uns", "commit", "torch")},
        "config": yaml.safe_load(extractor.config),
    }


def run(arguments: argparse.Namespace) -> None:
    """Write the ONNX file and its sidecar once they give what torch gives.

    Raises:
        RuntimeError: the features differ by more than the tolerance; no file stays.
    """
    require_onnx()
    from tempfile import TemporaryDirectory

    from fastreid_uns.commands.output import make_folder, write_output
    from fastreid_uns.predictor import FeatureExtractor, find_checkpoint
    from fastreid_uns.published import HUB

    if arguments.weights.startswith(HUB) and arguments.output is None:
        raise InvalidValue(
            f"export: no file to write is named, and {arguments.weights} has no folder here. Add one, for example "
            f"encoder.onnx."
        )
    weights = find_checkpoint(arguments.weights)
    output = arguments.output or Path(weights).with_name("encoder.onnx")
    extractor = FeatureExtractor.from_checkpoint(weights, plugins=arguments.plugins, device="cpu")
    normalisation = Normalisation.of(extractor, arguments.normalisation)
    make_folder(output.parent)
    with TemporaryDirectory() as folder:  # nobody shall use a file that was not checked
        file = Path(folder) / "encoder.onnx"
        export(taking_normalised(extractor, normalisation), file, arguments.opset)
        difference = checked_difference(extractor, file, arguments.tolerance, normalisation)
        write_output(output, file.read_bytes())
    sidecar = output.with_suffix(".json")
    write_output(sidecar, f"{json.dumps(description(extractor, difference, normalisation), indent=2)}\n".encode())
    height, width = extractor.size
    pixels = "in 0..1" if normalisation.where == "inside" else f"less {normalisation.mean}, over {normalisation.std}"
    print(
        f"{output}: {height}x{width} RGB {pixels} -> {extractor.dim} features, batch free; largest difference "
        f"to torch {difference:.1e}; {sidecar}"
    )


def main(arguments: list[str] | None = None) -> int:
    """See `commands.main`."""
    args = parse_arguments(arguments)
    return finished(run, args)
