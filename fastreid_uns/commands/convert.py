"""Convert the weights of another project into an encoder of ours, and show what became of each tensor."""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence

from fastreid_uns.commands import finished
from fastreid_uns.errors import InvalidValue
from fastreid_uns.utils.places import expanded, path_of


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line of `convert`."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: fastreid-uns convert lup_moco_r50.pth r50.safetensors MODEL.BACKBONE.MODEL resnet50",
    )
    parser.add_argument("source", type=expanded, help="file, URL, hub:user/name, or imagenet")
    parser.add_argument("output", type=path_of, help="file to write: .safetensors or .pth")
    parser.add_argument("--config-file", help="YAML file that describes the encoder")
    parser.add_argument("--min-share", type=float, default=0.9, help="of the backbone, found in the file; 0..1")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="keys of the config to change")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """See `commands.main`."""
    return finished(run, parse_arguments(arguments))


def run(args: argparse.Namespace) -> None:
    """Write the weights under the names of an `Encoder`, and print what the file had.

    Raises:
        InvalidValue: the output has another suffix.
        UserError: the weights cannot be read, or too few of them fit.
    """
    if args.output.suffix not in (".safetensors", ".pth"):
        raise InvalidValue(f"{args.output}: files end in .safetensors or .pth. Rename the output.")

    import torch
    from safetensors.torch import save

    from fastreid_uns.commands.output import write_output
    from fastreid_uns.config import load_config
    from fastreid_uns.modeling.encoder import build_encoder
    from fastreid_uns.modeling.weights import load_weights

    encoder = build_encoder(load_config(args.config_file, args.overrides))
    print(load_weights(encoder, args.source, min_share=args.min_share))
    state = {name: value.contiguous() for name, value in encoder.state_dict().items()}
    content = io.BytesIO()
    if args.output.suffix == ".safetensors":
        content.write(save(state))
    else:
        torch.save({"model": state}, content)
    write_output(args.output, content.getvalue())
    print(f"{len(state)} tensors written to {args.output}; set MODEL.WEIGHTS to it.")
