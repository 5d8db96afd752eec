"""Train, resume or evaluate what a config describes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastreid_uns.engine import default_argument_parser, default_setup, launch


def main(arguments):
    from fastreid_uns import DefaultTrainer, load_config

    cfg = load_config(arguments.config_file, arguments.opts)
    default_setup(cfg, arguments)
    if arguments.eval_only:
        return DefaultTrainer.test(cfg, DefaultTrainer.load_model(cfg))
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=arguments.resume)
    trainer.train()
    return trainer.results


if __name__ == "__main__":
    arguments = default_argument_parser(__doc__).parse_args()
    launch(main, arguments.num_gpus, args=(arguments,))
