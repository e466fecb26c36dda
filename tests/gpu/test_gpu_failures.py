"""CUDA: a device that has failed, a forked child and a device that is not used, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.gpu

PREPARE = """
import ctypes, gc, os, sys
library = ctypes.CDLL(None)
is_stub = hasattr(library, "fake_cuda_fail")  # see tests/support/cuda_stub
if is_stub:
    import simulated_kernels
import torch
from torch import nn
import hotglm
from hotglm.errors import StageFailedError

class Adder(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1 << 18), requires_grad=False)
    def forward(self, x):
        return self.weight + x

def make(device):
    return hotglm.ModuleSlot(Adder().to(device), name="m", version="1.0.0", memory=hotglm.MemoryPolicy(small_nbytes=0))

def update(slot, number):
    slot.update({"weight": torch.full((1 << 18,), float(number))}, version=f"1.0.{number}")
"""


def run(script: str) -> list[str]:
    """Run a script in a process of its own; return the lines that it printed, once it has ended well."""
    done = subprocess.run(
        [sys.executable, "-c", PREPARE + script], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def test_a_device_that_has_failed_is_told_and_ends_no_process() -> None:
    """Hazard: after an error that ended the context, torch's allocator raises in the destructor of a block."""
    script = """
slot = make("cuda")
for number in (1, 2, 3):
    update(slot, number)
if is_stub:
    library.fake_cuda_fail(1)
else:
    try:
        torch.zeros(3, device="cuda")[torch.tensor([7], device="cuda")]
        torch.cuda.synchronize()
    except RuntimeError:
        pass
for number in (4, 5):
    try:
        update(slot, number)
    except StageFailedError as error:
        print(slot.version, error.code)
slot.close()
del slot
gc.collect()
print("closed")
"""
    assert run(script) == ["1.0.3 STAGE_FAILED", "1.0.3 STAGE_FAILED", "closed"]


def test_a_forked_child_may_drop_a_slot() -> None:
    """Hazard: a block that goes in a child, where the driver records no events, ends the child by a signal."""
    script = """
slot = make("cuda")
for number in (1, 2, 3):
    update(slot, number)
child = os.fork()
if not child:
    if is_stub:
        library.fake_cuda_fail(1)
    del slot
    gc.collect()
    sys.exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
update(slot, 4)
print(slot(torch.zeros((), device="cuda")).cpu().unique().tolist())
"""
    assert run(script) == ["0", "[4.0]"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_used_gets_no_context() -> None:
    """Hazard: threads of a stage begin with device 0 current, and a context on it takes half a GiB."""
    script = """
slot = make("cuda:1")
for number in (1, 2, 3):
    update(slot, number)
    slot.verify_live()
slot.rollback()
print(slot(torch.zeros((), device="cuda:1")).cpu().unique().tolist())
slot.close()
print(torch._C._cuda_hasPrimaryContext(0), torch._C._cuda_hasPrimaryContext(1))
"""
    assert run(script) == ["[2.0]", "False True"]
