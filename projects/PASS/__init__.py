"""PASS: a transformer with tokens of its own for the upper, the middle and the lower part of a person."""

from . import heads as heads
