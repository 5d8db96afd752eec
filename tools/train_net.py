"""Train, resume or evaluate what a config describes."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="KEY VALUE pairs change any key of the config, for example: SOLVER.EPOCHS 30 MODEL.LOSSES.triplet null",
    )
    parser.add_argument("--config-file", required=True, help="YAML file, for example projects/ACFL/configs/msmt.yaml")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint of OUTPUT_DIR")
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS, or the newest checkpoint")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="processes on this machine, one per GPU")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="keys of the config to change")
    return parser.parse_args()


def start_processes(count: int) -> int:
    """Run this command again under torchrun, once for each GPU."""
    import subprocess

    arguments = sys.argv[1:]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return subprocess.call([*launch, str(Path(__file__).resolve()), *arguments])


def evaluate(cfg) -> dict[str, dict[str, float]]:
    """Numbers of the given weights, or of the newest checkpoint of OUTPUT_DIR."""
    from fastreid_uns.engine.default import DefaultTrainer
    from fastreid_uns.utils import checkpoint, comm

    device = comm.init_from_environment(cfg.MODEL.DEVICE)
    if cfg.MODEL.WEIGHTS:
        model = DefaultTrainer.build_model(cfg, num_images=1)
    else:
        file = checkpoint.last_checkpoint(Path(cfg.OUTPUT_DIR))
        content = checkpoint.load_checkpoint(file)
        model = DefaultTrainer.build_model(cfg, content["num_images"])
        checkpoint.load_model(model, content, file)
    return DefaultTrainer.test(cfg, model.to(device))


def train(cfg, resume: bool) -> dict[str, dict[str, float]]:
    """Numbers after the last epoch."""
    from fastreid_uns.engine.default import DefaultTrainer
    from fastreid_uns.utils import checkpoint

    folder = Path(cfg.OUTPUT_DIR)
    if not resume and (folder / checkpoint.LAST).is_file():
        raise ValueError(
            f"{folder} holds a run already ({checkpoint.last_checkpoint(folder).name}). Continue it with --resume, "
            f"choose another OUTPUT_DIR, or delete the folder."
        )
    trainer = DefaultTrainer(cfg)
    if resume:
        trainer.resume()
    trainer.train()
    return trainer.results


def main() -> int:
    arguments = parse_arguments()
    if arguments.num_gpus > 1 and "RANK" not in os.environ:
        return start_processes(arguments.num_gpus)

    from fastreid_uns.config import load_config
    from fastreid_uns.engine.log import logger, setup_logging
    from fastreid_uns.utils import comm

    try:
        cfg = load_config(arguments.config_file, arguments.overrides)
        comm.init_from_environment(cfg.MODEL.DEVICE)
        folder = Path(cfg.OUTPUT_DIR)
        folder.mkdir(parents=True, exist_ok=True)
        setup_logging(folder)
        results = evaluate(cfg) if arguments.eval_only else train(cfg, arguments.resume)
    except (ValueError, KeyError, FileNotFoundError, RuntimeError, ImportError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"error: {message}", file=sys.stderr)
        logger.debug("the error above, in full:", exc_info=error)
        return 2
    if results and comm.rank() == 0:
        from tabulate import tabulate

        columns = list(next(iter(results.values())))
        rows = [[name, *(numbers[column] for column in columns)] for name, numbers in results.items()]
        logger.info("\n%s", tabulate(rows, ["data set", *columns], floatfmt=".2f"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
