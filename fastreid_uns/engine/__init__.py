"""The training loop, its hooks, and what starts them."""

# at once and not lazily: the function must win over the module of the same name
from fastreid_uns.engine.launch import default_argument_parser, default_setup, launch, run_command
from fastreid_uns.utils.lazy import lazy_names

__all__ = ["default_argument_parser", "default_setup", "launch", "run_command"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "CheckpointHook": "hooks",
        "DefaultTrainer": "default",
        "EvaluateHook": "hooks",
        "LogHook": "hooks",
        "MomentumEncoderHook": "hooks",
        "ProfileHook": "profiling",
        "ReclusterHook": "recluster",
        "ScheduleHook": "hooks",
        "Trainer": "trainer",
        "setup_logging": "log",
    },
)
