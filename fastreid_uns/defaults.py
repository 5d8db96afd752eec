"""Keys that belong to no component, with their defaults and units.

The keys of a component are the keyword-only parameters of its class; they are completed by `config.load_config`.
"""

from typing import Any

DEFAULTS: dict[str, Any] = {
    "PLUGINS": [],  # dotted modules, entry points of the group fastreid_uns.plugins, or folders relative to the YAML
    "SEED": 1,
    "OUTPUT_DIR": "output/run",
    "DETERMINISTIC": False,  # bit-equal runs on CUDA as well, at the price of slower kernels
    "DATASETS": {
        "TRAIN": {"NAME": ""},  # images without labels
        "SOURCES": {},  # labelled sets for domain adaptation, a map of free names
        "TESTS": {},  # sets to evaluate on, a map of free names
    },
    "INPUT": {
        "SIZE": [],  # height, width in pixels; [] = what the weights of MODEL.WEIGHTS imagenet expect, else as below
        "MEAN": [],  # of RGB in 0..1; [] = likewise
        "STD": [],
        "VIEWS": ["train"],  # one augmented version of the batch for each name, a key of AUGMENTS
        "AUGMENTS": {"train": {"NAME": "Augment"}},  # presets, a map of free names; NAME may be left out
        "CAMERA_STYLE": {  # what views show whose preset has CAMERA_STYLE
            "KIND": "colors",  # colours of another camera, or images: generated pictures of a folder
            "FOLDER": "",  # of KIND images: <stem>_fake_<camera>to<other>.jpg, cameras counted from 1
        },
        "ON_BAD_IMAGE": "stop",  # stop before the first epoch, or skip with a count
    },
    "DATALOADER": {
        "CACHE": "none",  # where decoded images are held: device, host or disk; none = decode them in every epoch
        "CACHE_DIR": "",  # folder of the pixel files of CACHE disk; "" = OUTPUT_DIR/cache
        "WORKERS": 4,  # processes that decode
        "SAMPLER": {"NAME": "ClusterSampler"},
        "SOURCE_SAMPLER": {"NAME": "ClusterSampler"},  # of each labelled set, with its true labels
    },
    "MODEL": {
        "NAME": "Baseline",
        "DEVICE": "auto",  # auto, cpu, cuda
        "WEIGHTS": "",  # file or URL; imagenet = of an installed package, else of the backbone's library; "" = random
        "WEIGHTS_HEAD": True,  # take the head from WEIGHTS too, where the file has one; false = it starts anew
        "GHOST_BATCH": 0,  # images that share norm statistics in training; 0 = the batch of one process
        "FREEZE_NORM": False,  # batch norms of the backbone keep their statistics in training; weight and bias train
        "DOMAIN_BN": False,  # norm layers of their own for each of the DATASETS.SOURCES
        "BACKBONE": {"NAME": "torchvision"},
        "HEAD": {"NAME": "EmbeddingHead"},
        "MEMORY": {"NAME": "ClusterMemory"},
        "LOSSES": {"contrast": {"NAME": "CrossEntropyLoss"}},
    },
    # DECISIONS, of any generator: files of answers, or answers [first, second, same or different] themselves
    "PSEUDO_LABELS": {"NAME": "DBSCANLabels"},
    "SOLVER": {
        "OPTIMIZER": "Adam",  # a class of torch.optim, or a name of timm's optimiser factory such as lars
        "OPTIMIZER_ARGS": {},  # further keyword arguments of the optimiser, lower case
        "BASE_LR": 3.5e-4,
        "WEIGHT_DECAY": 5e-4,
        "WEIGHT_DECAY_NORM": 5e-4,  # of norm weights and all biases
        "EPOCHS": 50,  # clustering rounds
        "ITERS_PER_EPOCH": 200,  # optimiser steps; 0 = one pass over the clustered images, by epoch another number
        "SCHEDULE": "step",  # step, milestones, cosine or constant
        "STEP_EPOCHS": 20,  # of step: epochs between two decays
        "MILESTONES": [20, 40],  # of milestones: epochs at which the rate decays
        "GAMMA": 0.1,  # factor of one decay
        "MIN_LR": 0.0,  # of cosine: rate at the end
        "WARMUP_EPOCHS": 0,  # linear rise to BASE_LR
        "WARMUP_FACTOR": 0.01,  # of BASE_LR at the first step
        "WARMUP_BY": "step",  # the rate rises with each step, or is constant within an epoch
        "RATE_FACTORS": {},  # beginning of the names of parameters, such as encoder.head → factor on their rate
        "FREEZE": [],  # beginnings of the names of parameters that do not train, such as encoder.backbone.stem
        "RESET_STATE": False,  # the optimiser forgets its moments at each clustering
        "AMP": "auto",  # bfloat16, float16, none; auto = the faster one of bfloat16 and none, by measurement on a CPU
        "CLIP_NORM": 0.0,  # largest norm of the gradient; 0 = no clipping
        # parts into which a batch is cut to save memory: losses and memories are those of the whole batch, but batch
        # norm (unless MODEL.GHOST_BATCH divides a part) and losses that compare images of a batch see a part at a time
        "ACCUMULATE": 1,
        "COMPILE": False,  # torch.compile of the encoder
        "CHANNELS_LAST": True,
        "FIND_UNUSED": False,  # several processes: search for parameters without gradient in each step
    },
    "CHECKPOINT": {
        "PERIOD": 1,  # epochs; 0 = never
        "KEEP": 1,  # newest files that stay; the best one stays as well
    },
    "LOG": {
        "PERIOD_STEPS": 50,  # steps between two lines on the console; 0 = never
        "WRITERS": ["text", "json", "tensorboard"],
        "CLUSTER_QUALITY": False,  # ARI, NMI and purity against the true identities, where the set has them
    },
    "TEST": {
        "PERIOD": 10,  # epochs; 0 = only after training
        "BATCH_SIZE": 256,
        "RERANK": "none",  # jaccard or camera_jaccard: score a second, re-ranked list as well
        "DOMAINS": {},  # test set → one of DATASETS.SOURCES whose MODEL.DOMAIN_BN layers it is measured with
        "PATIENCE": 0,  # evaluations without a better mAP after which training stops; 0 = never
    },
    "DISTRIBUTED": {
        "TIMEOUT_MINUTES": 30.0,  # several processes end with a message when one of them has stood still for so long
    },
    "HOOKS": {},  # further hooks, a map of free names
    "PAPER": {},  # what the paper states, keys and values as above; a run says where it departs from it
}

# what becomes of the empty keys of INPUT where the starting weights expect nothing else
USUAL_INPUT: dict[str, list[float]] = {
    "SIZE": [256, 128],
    "MEAN": [0.485, 0.456, 0.406],
    "STD": [0.229, 0.224, 0.225],
}
