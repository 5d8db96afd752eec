"""What `DETERMINISTIC` asks of the libraries."""

import os

import torch

from fastreid_uns.utils.seed import seed_everything


def test_deterministic_runs_ask_cublas_for_it_too(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seed_everything(0)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    try:
        seed_everything(0, deterministic=True)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # what the user has chosen stays
        seed_everything(0, deterministic=True)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    finally:
        seed_everything(0)
    assert not torch.are_deterministic_algorithms_enabled()
