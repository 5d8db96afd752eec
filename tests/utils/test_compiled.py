"""Machine code that is kept on disk, if the disk takes it, and threads that share its rows."""

import numba.core.caching
import numpy as np
import pytest
import torch

from fastreid_uns.utils.compiled import Workers, compiled


def test_a_full_disk_does_not_end_a_run(monkeypatch):
    tried = []

    def full(*arguments):
        tried.append(arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(numba.core.caching.IndexDataCacheFile, "save", full)
    assert compiled(lambda x: x + 1)(2) == 3
    assert tried


@pytest.mark.parametrize("threads", [1, 3])
def test_parts_of_a_kernel_are_joined_in_the_order_of_its_rows(threads):
    def kernel(start, stop, factor):
        rows = np.arange(start, stop)
        return rows, np.repeat(factor * rows, 2)

    kept = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with Workers() as workers:
            parts = workers.over_rows(kernel, 100, 10)
            assert len(parts) == (1 if threads == 1 else 24)
            rows, repeated = workers.joined(parts)
    finally:
        torch.set_num_threads(kept)
    assert rows.tolist() == list(range(100))
    assert repeated.tolist() == [10 * row for row in range(100) for _ in range(2)]
    assert not parts
