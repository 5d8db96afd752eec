"""Which device a word means."""

import pytest
import torch

from fastreid_uns.errors import InvalidState, InvalidValue
from fastreid_uns.utils.comm import choose_device


def test_a_device_that_is_there():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_devices_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidState, match=r"mps was asked for, but torch finds no GPU of Apple; set it to cpu"):
        choose_device("mps")
    with pytest.raises(InvalidState, match=r"cuda:7 was asked for, but torch finds no CUDA device"):
        choose_device("cuda:7")
    with pytest.raises(InvalidValue, match=r"'tape' is unknown"):
        choose_device("tape")
