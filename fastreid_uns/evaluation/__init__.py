"""Features of image sets, and how well they retrieve."""

from fastreid_uns.utils.lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Evaluator": "evaluator",
        "Ranker": "retrieval",
        "cluster_quality": "clusters",
        "extract_features": "extract",
        "retrieve": "retrieval",
    },
)
