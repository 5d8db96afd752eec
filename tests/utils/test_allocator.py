import subprocess
import sys

import pytest

from fastreid_uns.utils.allocator import raise_malloc_thresholds

FAULTS = """
import resource, sys
import numpy as np
from fastreid_uns.utils.allocator import raise_malloc_thresholds
if sys.argv[1] != "leave":
    assert raise_malloc_thresholds(large=sys.argv[1] == "large")
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(2 ** int(sys.argv[2]), np.uint8).fill(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str, power: int = 27) -> int:
    """Pages that the system had to bring for the third block of 2^power bytes, of 4 KiB or 2 MiB each."""
    command = [sys.executable, "-c", FAULTS, mode, str(power)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux" or not raise_malloc_thresholds(), reason="needs glibc")
def test_a_block_that_was_freed_is_used_again():
    assert faults("large") < 10 < 60 < faults("leave")
    assert faults("small", 24) < 10
    assert faults("small") > 60
