"""Machine code that is kept on disk, if the disk takes it."""

import numba.core.caching

from fastreid_uns.utils.compiled import compiled


def test_a_full_disk_does_not_end_a_run(monkeypatch):
    tried = []

    def full(*arguments):
        tried.append(arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(numba.core.caching.IndexDataCacheFile, "save", full)
    assert compiled(lambda x: x + 1)(2) == 3
    assert tried
