"""Whatever fails on the way of plain weights into a quantised slot: typed, nothing changed, nothing left."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hotglm
from hotglm.errors import HotglmError, StageTimeoutError
from hotglm.testing.seams import fail_with, hooked, only_nth
from support.quantised import KINDS
from support.swaps import same_bits
from support.wrapped import X, make_plain, quantise_layers

MAX_CALLS = 80

FAULTS: dict[str, Callable[[], BaseException]] = {
    "reach": lambda: RuntimeError("planted"),
    "map_anonymous": lambda: OSError(12, "planted"),
    "start_thread": lambda: RuntimeError("planted"),
    "open": lambda: OSError(5, "planted"),
    "fstat": lambda: OSError(5, "planted"),
    "preadv": lambda: OSError(5, "planted"),
}


def make_slot(quantize: Callable[[Any], Any] = quantise_layers, **options: Any) -> hotglm.ModuleSlot:
    requantize = hotglm.Requantize(build=lambda: make_plain(0), quantize=quantize)
    return hotglm.ModuleSlot(KINDS["wrappers"].make(1), name="model", version="1.0.0", requantize=requantize, **options)


@pytest.mark.parametrize("policy", [hotglm.Flip(), hotglm.InPlace()], ids=["flip", "in place"])
@pytest.mark.parametrize("kind", FAULTS)
def test_the_nth_call_that_fails_is_a_typed_refusal(
    kind: str, policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K06: each call of a kind fails in turn; the live version serves, bit for bit, until an update comes through."""
    monkeypatch.setattr("hotglm.weights.proof._SMALL_NBYTES", 0)
    path = tmp_path / "plain.safetensors"
    hotglm.save_weights(make_plain(2), path)
    slot = make_slot(swap=policy, policy=hotglm.StagePolicy(num_threads=2, warm_up=(X,)))
    before = slot(X)
    for number in range(1, MAX_CALLS):
        failure: HotglmError | None = None
        with hooked(only_nth(kind, number, fail_with(kind, FAULTS[kind]))) as seen:
            try:
                slot.update(path, version="1.0.1")
            except HotglmError as error:
                failure = error
        if failure is None:
            break
        assert failure.serving == "1.0.0"
        assert same_bits(slot(X), before)
        slot.verify_live()
    else:
        pytest.fail("the sweep did not come to its end")
    assert number > 1
    assert seen.counts[kind] < number or kind == "start_thread"  # of which one is of a commit in place
    assert same_bits(slot(X), KINDS["wrappers"].make(2)(X))
    slot.rollback()
    assert same_bits(slot(X), before)


def test_a_quantiser_that_takes_too_long_is_given_up() -> None:
    """The caller goes on after the policy's time; what comes out in the end is dropped."""
    leave, left = threading.Event(), threading.Event()
    calls: list[int] = []

    def quantize(model: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            assert leave.wait(60)
            quantise_layers(model)
            left.set()
            return
        quantise_layers(model)

    slot = make_slot(quantize, policy=hotglm.StagePolicy(timeout_s=0.2))
    before = slot(X)
    with pytest.raises(StageTimeoutError) as caught:
        slot.update(make_plain(2).state_dict(), version="1.0.1")
    assert caught.value.serving == "1.0.0"
    assert same_bits(slot(X), before)
    slot.update(make_plain(3).state_dict(), version="1.0.2", policy=hotglm.StagePolicy())
    leave.set()
    assert left.wait(60)
    for thread in [t for t in threading.enumerate() if t.name.startswith("hotglm-stage")]:
        thread.join(60)
    assert same_bits(slot(X), KINDS["wrappers"].make(3)(X))
    slot.verify_live()
    slot.rollback()
    assert same_bits(slot(X), before)


@pytest.mark.parametrize("policy", [hotglm.Flip(), hotglm.InPlace()], ids=["flip", "in place"])
def test_passes_beside_swaps_are_of_one_version(policy: Any) -> None:
    """Many swaps beside busy readers: every answer is that of one version, quantised as a whole."""
    answers = {seed: KINDS["wrappers"].make(seed)(X) for seed in (1, 2, 3)}
    slot = make_slot(swap=policy)
    is_over, wrong = threading.Event(), list[torch.Tensor]()
    num_passes = [0, 0]

    def read(index: int) -> None:
        with torch.no_grad():
            while not is_over.is_set():
                found = slot(X)
                num_passes[index] += 1
                if not any(same_bits(found, answer) for answer in answers.values()):
                    wrong.append(found)

    readers = [threading.Thread(target=read, args=(index,)) for index in range(2)]
    for reader in readers:
        reader.start()
    try:
        for number in range(12):
            slot.update(make_plain(2 + number % 2).state_dict(), version=f"1.0.{number + 1}")
            if number % 4 == 3:
                slot.rollback()
    finally:
        is_over.set()
        for reader in readers:
            reader.join(60)
    assert not wrong
    assert min(num_passes) > 0


def test_nothing_is_left_after_many_swaps() -> None:
    """P9: threads and arenas are as many after twelve swaps as after six."""
    slot = make_slot()
    sizes = []
    for number in range(12):
        slot.update(make_plain(2 + number % 2).state_dict(), version=f"1.0.{number + 1}")
        if number in (5, 11):
            gc.collect()
            sizes.append((threading.active_count(), slot._core.spares.pool.nbytes))
    assert sizes[0] == sizes[1]
