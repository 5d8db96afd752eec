"""Unsupervised object re-identification: registries, one trainer, one folder for each paper."""

__version__ = "0.1.0"
