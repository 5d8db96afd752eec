"""The first plugin: imports every module of the core that registers something."""

import importlib

for _module in (
    "data.augment",
    "data.camera_sampler",
    "data.datasets.csv_file",
    "data.datasets.cuhk03",
    "data.datasets.folder",
    "data.datasets.market1501",
    "data.datasets.msmt17",
    "data.datasets.personx",
    "data.datasets.synthetic",
    "data.datasets.vehicleid",
    "data.datasets.vehiclex",
    "data.datasets.veri776",
    "data.datasets.veriwild",
    "data.samplers",
    "engine.profiling",
    "modeling.backbones.osnet",
    "modeling.backbones.resnet_ibn",
    "modeling.backbones.small_net",
    "modeling.backbones.timm_net",
    "modeling.backbones.torchvision_net",
    "modeling.backbones.vit",
    "modeling.heads",
    "modeling.losses",
    "modeling.memory",
    "modeling.meta_arch",
    "modeling.proxies",
    "pseudo_labels.dbscan",
    "pseudo_labels.kmeans",
    "pseudo_labels.linkage",
):
    importlib.import_module(f"fastreid_uns.{_module}")
