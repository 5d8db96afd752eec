import subprocess
import sys

import pytest

from fastreid_uns.utils.allocator import raise_malloc_thresholds

FAULTS = """
import resource, sys
import numpy as np
from fastreid_uns.utils.allocator import raise_malloc_thresholds
if sys.argv[1] == "keep":
    assert raise_malloc_thresholds()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(2**27, np.uint8).fill(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    """Pages that the system had to bring for the third block of 128 MiB, of 4 KiB or 2 MiB each."""
    done = subprocess.run([sys.executable, "-c", FAULTS, mode], check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux" or not raise_malloc_thresholds(), reason="needs glibc")
def test_a_block_that_was_freed_is_used_again():
    assert faults("keep") < 10 < 60 < faults("leave")
