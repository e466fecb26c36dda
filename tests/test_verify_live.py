"""`verify_live`: what is live is read again, and whatever is not what was committed is named (G18)."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import pytest
import torch
from torch import nn

import hotglm
from hotglm.errors import LiveMismatchError
from hotglm.progress import Progress
from hotglm.weights.seals import seal_tensor
from support.swaps import build, make_class, same_bits
from support.torn import run_in_thread

MAKER = build(lambda: nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 2)).eval())
SWAPS = [hotglm.Flip(), hotglm.InPlace()]
X = torch.ones(3, 8)


def make_slot(swap: hotglm.Flip | hotglm.InPlace, **options: Any) -> hotglm.ModuleSlot:
    slot = hotglm.ModuleSlot(MAKER(1), name="model", version="1.0.0", swap=swap, **options)
    slot.update(MAKER(2).state_dict(), version="1.0.1")
    return slot


def flip_bit(tensor: torch.Tensor, byte: int = 0) -> None:
    (ctypes.c_uint8 * (byte + 1)).from_address(tensor.data_ptr())[byte] ^= 1


@pytest.mark.parametrize("swap", SWAPS, ids=["flip", "in place"])
def test_what_is_live_is_what_was_committed(swap: hotglm.Flip | hotglm.InPlace) -> None:
    """P12: after updates and rollbacks the digests taken now are those of the receipt, and of a cold start."""
    slot = make_slot(swap)
    receipt = slot.update(MAKER(3).state_dict(), version="1.0.2")
    proof = slot.verify_live()
    assert (proof.slot, str(proof.version), proof.number) == ("model", "1.0.2", 3)
    assert proof.digest == receipt.digest
    assert dict(proof.digests) == dict(receipt.digests)
    assert proof.num_compared == len(proof.digests) == len(MAKER(1).state_dict())
    assert proof.nbytes == sum(t.numel() * t.element_size() for t in MAKER(1).state_dict().values())
    slot.rollback()
    assert slot.verify_live().digest == make_slot(swap).live.digest


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("swap", SWAPS, ids=["flip", "in place"])
def test_one_flipped_bit_is_found(swap: hotglm.Flip | hotglm.InPlace, quick: bool) -> None:
    """G18: in any tensor, at either end; the tensor is named, and nothing is changed by looking."""
    slot = make_slot(swap)
    slot.verify_live()  # the quick form needs fingerprints, which this takes
    for name, tensor in slot.live.module.state_dict().items():
        for byte in (0, tensor.numel() * tensor.element_size() - 1):
            flip_bit(tensor, byte)
            with pytest.raises(LiveMismatchError) as caught:
                slot.verify_live(quick=quick)
            assert [problem.tensor for problem in caught.value.problems] == [name]
            assert caught.value.problems[0].expected == slot.live.digests[name]
            flip_bit(tensor, byte)
    assert slot.verify_live(quick=quick).digest == slot.live.digest
    assert same_bits(slot(X), MAKER(2)(X))


def test_every_tensor_that_differs_is_named() -> None:
    """All of them in one error, and a rollback makes it good."""
    slot = make_slot(hotglm.Flip())
    with torch.no_grad():
        for parameter in slot.live.module.parameters():
            parameter.add_(1)
    with pytest.raises(LiveMismatchError) as caught:
        slot.verify_live(num_threads=2)
    assert {p.tensor for p in caught.value.problems} == {name for name, _ in MAKER(1).named_parameters()}
    slot.rollback()
    slot.verify_live()
    assert same_bits(slot(X), MAKER(1)(X))


def test_the_quick_form_hashes_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a fingerprint was taken it is compared instead of a digest; where none was, it is taken now."""
    slot = make_slot(hotglm.Flip())
    hashed: list[object] = []
    seal = seal_tensor

    def count(tensor: torch.Tensor, **options: Any) -> Any:
        hashed.append(tensor)
        return seal(tensor, **options)

    monkeypatch.setattr("hotglm.slot.live_proof.seal_tensor", count)
    first = slot.verify_live(quick=True)
    assert len(hashed) == len(MAKER(1).state_dict())
    hashed.clear()
    assert slot.verify_live(quick=True).digests == first.digests
    assert hashed == []


def test_a_module_that_came_by_itself_has_nothing_to_be_compared_with() -> None:
    """The first generation has no digests; those of now are returned, and say so."""
    slot = hotglm.ModuleSlot(MAKER(1), name="model", version="1.0.0")
    proof = slot.verify_live()
    assert proof.num_compared == 0
    cold = hotglm.ModuleSlot(MAKER(2), name="model", version="1.0.0")
    assert proof.digest == cold.update(MAKER(1).state_dict(), version="1.0.1").digest


def test_tied_tensors_are_read_once() -> None:
    """Bytes are counted once, and both names get the digest."""

    def tie(self: Any) -> None:
        self.other = nn.Linear(2, 2, bias=False)
        self.other.weight = self.linear.weight

    slot = hotglm.ModuleSlot(build(make_class(tie))(1), name="model", version="1.0.0")
    proof = slot.verify_live()
    assert proof.nbytes == 4 * 4 + 2 * 4
    assert proof.digests["other.weight"] == proof.digests["linear.weight"]


@pytest.mark.parametrize("num_commits", [1, 10])
@pytest.mark.parametrize("swap", SWAPS, ids=["flip", "in place"])
def test_a_commit_meanwhile_is_no_mismatch(swap: hotglm.Flip | hotglm.InPlace, num_commits: int) -> None:
    """What was read while a commit wrote is read again; with commits that never cease, they are kept out for once."""
    slot = make_slot(swap)
    left = num_commits
    failures: list[BaseException] = []

    def commit() -> None:
        try:
            slot.update(MAKER(3 + left).state_dict(), version=f"1.0.{20 - left}")
        except hotglm.DrainTimeoutError as error:
            failures.append(error)

    def report(progress: Progress) -> None:
        nonlocal left
        # Not once commits are kept out: this very thread would be what they wait for.
        if left and not _is_inside(slot):
            left -= 1
            run_in_thread(commit)

    proof = slot.verify_live(progress=report)
    assert failures == []
    if isinstance(swap, hotglm.InPlace):
        assert proof.number == slot.live.number
    slot.verify_live()


def _is_inside(slot: hotglm.ModuleSlot) -> bool:
    gate = getattr(slot._admission, "gate", None)
    return gate is not None and gate.is_inside()


def test_it_can_be_cancelled() -> None:
    """What `progress` raises ends it; workers end, and the slot serves on."""
    slot = make_slot(hotglm.InPlace())

    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        slot.verify_live(progress=stop)
    for thread in threading.enumerate():
        if thread.name.startswith("hotglm-verify"):
            thread.join(30)
            assert not thread.is_alive()
    slot.update(MAKER(3).state_dict(), version="1.0.2")
    assert same_bits(slot(X), MAKER(3)(X))
