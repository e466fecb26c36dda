"""FAULTS K06 for releases: the Nth call of every kind fails while one is staged, and the live generation serves."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import hotglm
from hotglm.errors import HotglmError
from hotglm.release.packing import pack
from hotglm.testing.seams import fail_with, hooked, only_nth
from support.releases import write_source

KINDS = ("open", "fstat", "lstat", "listdir", "pread", "preadv", "close", "flock")
MAX_CALLS = 100


@pytest.fixture
def slot() -> Iterator[hotglm.ModuleSlot]:
    module = nn.Module()
    for name, tensor in {
        "w": torch.zeros(2, 3),
        "b": torch.zeros(3, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4, dtype=torch.int8),
        "scalar": torch.zeros((), dtype=torch.int64),
    }.items():
        module.register_buffer(name, tensor)
    made = hotglm.ModuleSlot(module, name="ranker", version="1.0.0", accept="major")
    yield made
    made.close()


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.EACCES, errno.ESTALE, errno.ENOLCK])
@pytest.mark.parametrize("kind", KINDS)
def test_the_nth_call_fails(kind: str, number: int, slot: hotglm.ModuleSlot, tmp_path: Path) -> None:
    """Whichever call fails, staging a release raises a typed error or succeeds; nothing changes or stays open."""
    for version in ("1.1.0", "1.2.0"):
        source = write_source(tmp_path / f"s{version}", seed=int(version[2]), shards=True)
        pack(source, tmp_path / version, name="ranker", version=version).close()
    slot.update(tmp_path / "1.1.0")
    for nth in range(1, MAX_CALLS):
        before = set(os.listdir("/proc/self/fd"))
        weights = slot.live.module.get_buffer("w").clone()
        with hooked(only_nth(kind, nth, fail_with(kind, lambda: OSError(number, os.strerror(number))))) as seen:
            try:
                slot.update(tmp_path / "1.2.0")
            except HotglmError:
                assert str(slot.version) == "1.1.0"
                assert torch.equal(slot.live.module.get_buffer("w"), weights)
            else:
                slot.rollback()
        assert set(os.listdir("/proc/self/fd")) == before
        if seen.counts[kind] < nth:
            return
    raise AssertionError(f"Expected less than {MAX_CALLS} calls of {kind}.")
