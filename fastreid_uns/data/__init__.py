"""Images, samplers, augmentation and the batches that they give."""

from fastreid_uns.utils.lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Augment": "augment",
        "ImageSet": "image_set",
        "Sampler": "samplers",
        "TrainLoader": "loader",
        "TrainSet": "train_set",
        "build_test_loader": "build",
        "build_train_loader": "build",
        "build_train_set": "build",
    },
)
