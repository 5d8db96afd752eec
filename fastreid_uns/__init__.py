"""Unsupervised object re-identification: registries, one trainer, one folder for each paper."""

from fastreid_uns.utils.lazy import lazy_names

__version__ = "0.1.0"

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "DefaultTrainer": "engine.default",
        "FeatureExtractor": "predictor",
        "HookBase": "hook",
        "UserError": "errors",
        "group_photos": "photos.road",
        "load_config": "config",
    },
)
