"""Train, resume or evaluate what a config describes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastreid_uns.engine.launch import default_argument_parser, default_setup, launch


def run(arguments: Any) -> dict[str, dict[str, float]]:
    """Scores by test set, after training or of the given weights."""
    from fastreid_uns import DefaultTrainer, load_config

    cfg = load_config(arguments.config_file, arguments.opts)
    default_setup(cfg, arguments)
    if arguments.eval_only:
        return DefaultTrainer.test(cfg, DefaultTrainer.load_model(cfg))
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=arguments.resume)
    trainer.train()
    return trainer.results


def main(arguments: Sequence[str] | None = None) -> int:
    """See `commands.main`."""
    options = default_argument_parser(__doc__).parse_args(arguments)
    launch(run, options.num_gpus, args=(options,))
    return 0
