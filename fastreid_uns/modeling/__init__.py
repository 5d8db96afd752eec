"""Encoders, memories, losses, and the model that joins them."""

from fastreid_uns.utils.lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Baseline": "meta_arch",
        "Encoder": "encoder",
        "Memory": "memory",
        "MetaArch": "meta_arch",
        "build_encoder": "encoder",
        "build_model": "meta_arch",
        "load_weights": "weights",
    },
)
