"""Ready-made assertions on slots, for tests of your own.

Rules this module keeps:

- Each raises AssertionError, names everything that is wrong at once, and ends with what to do about it.
- None patches anything: what is asserted is what a service would see.
- Passes run in the grad mode of the caller; use `torch.inference_mode()` around a test if that is how you serve.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from hotglm.errors import HotglmError, IncompatibleError
from hotglm.model.recording import call_with
from hotglm.problem import describe_exception
from hotglm.slot.checks import Inputs
from hotglm.slot.slot import ModuleSlot
from hotglm.testing.faults import FAULT_KINDS, FaultPlan
from hotglm.testing.traffic import EXACT, Tolerance, Traffic, describe_differences

__all__ = [
    "Refusal",
    "assert_faults_change_nothing",
    "assert_no_recompile",
    "assert_no_torn_pass",
    "assert_refused",
    "assert_swap_equals_cold",
    "find_codes",
    "find_cold_differences",
    "look_at",
    "verify_unchanged",
]

_MAX_NTH = 200


def assert_swap_equals_cold(
    slot: ModuleSlot, cold: nn.Module, inputs: Inputs | None = None, *, tolerance: Tolerance = EXACT
) -> None:
    """See that what is live equals a model that was started cold with the same version (P12).

    Names, dtypes, shapes and bits of all parameters and buffers, those that are not persistent included, and the
    outputs for `inputs` where they are given.

    Args:
        slot: the slot, after its update.
        cold: a module of the live version, made without a slot: constructed and filled by `load_state_dict`.
        inputs: arguments of one pass.
        tolerance: for the outputs; the state must always be equal to the last bit.

    Raises:
        AssertionError: with every difference.
    """
    with slot.acquire() as generation:
        wrong = find_cold_differences(generation.module, cold, inputs, tolerance=tolerance)
    if wrong:
        raise AssertionError(_list(f"Expected version {slot.version} to equal a cold load of it, got:", wrong))


def find_cold_differences(
    module: nn.Module, cold: nn.Module, inputs: Inputs | None = None, *, tolerance: Tolerance = EXACT
) -> list[str]:
    """Return in words where `module` differs from `cold` in state, or if not there, in the answer to `inputs`."""
    wrong = describe_differences(_state_of(cold), _state_of(module), name="state")
    if inputs is None or wrong:
        return wrong
    return describe_differences(call_with(cold, inputs), call_with(module, inputs), tolerance=tolerance)


def _state_of(module: nn.Module) -> dict[str, Any]:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(module.named_buffers(remove_duplicate=False))}


def assert_no_torn_pass(
    slot: ModuleSlot,
    change: Callable[[], object],
    *,
    inputs: Inputs,
    after: Any,
    num_threads: int = 2,
    tolerance: Tolerance = EXACT,
) -> int:
    """Run `change` while threads call the slot, and see that each pass is of one version; return how many passes ran.

    A pass that ran while `change` did gives the old answer or the new one; one that began after it gives the new one.
    Where `change` raises, passes that begin after it must give the old answer, and its error is raised.

    Args:
        slot: the slot.
        change: updates it, rolls it back or commits a stage.
        inputs: arguments of every pass.
        after: the answer of the version that `change` makes live, computed without the slot.
        num_threads: threads that call.
        tolerance: for comparing outputs.

    Raises:
        AssertionError: a pass was torn, came too late or raised.
    """
    with Traffic(slot, inputs, num_threads=num_threads, tolerance=tolerance) as traffic:
        before = traffic.ask()
        traffic.announce(after)
        try:
            change()
        except BaseException:
            traffic.announce(before)
            traffic.settle()
            raise
        traffic.settle()
    return traffic.num_passes


@dataclass(slots=True, kw_only=True)
class Refusal:
    """What `assert_refused` caught, once its body has ended.

    Attributes:
        error: the error that refused.
        codes: every code in it: its own, its problems' and those of the verdict's reasons.
    """

    error: HotglmError | None = None
    codes: frozenset[str] = frozenset()


@contextlib.contextmanager
def assert_refused(*codes: str, slot: ModuleSlot | None = None, inputs: Inputs | None = None) -> Iterator[Refusal]:
    """Expect the body to be refused for each of `codes`, and the slot to be as it was.

    Example:
        >>> import torch, hotglm
        >>> slot = hotglm.ModuleSlot(torch.nn.Linear(2, 2), name="ranker", version="1.0.0")
        >>> with assert_refused("SHAPE_CHANGED", slot=slot, inputs=torch.ones(2)) as refusal:
        ...     receipt = slot.update(torch.nn.Linear(2, 3).state_dict(), version="1.0.1")
        >>> type(refusal.error).__name__
        'IncompatibleError'

    Args:
        codes: codes of breakages, problems or errors that must all be among the reasons; none for any refusal.
        slot: what must not change: version, generation, history and weights.
        inputs: arguments of a pass whose answer must not change, where a slot is given.

    Raises:
        AssertionError: nothing was refused, or for other reasons, or the slot has changed.
    """
    before = None if slot is None else look_at(slot, inputs)
    refusal, wanted = Refusal(), " and ".join(codes) or "any reason"
    try:
        yield refusal
    except HotglmError as error:
        refusal.error, refusal.codes = error, find_codes(error)
    if refusal.error is None:
        raise AssertionError(
            f"Expected a refusal for {wanted}, got none. Remedy: if it is right that this works now, drop the "
            "expectation."
        )
    if missing := [code for code in codes if code not in refusal.codes]:
        raise AssertionError(
            f"Expected a refusal for {' and '.join(missing)}, got one for {', '.join(sorted(refusal.codes))}:\n"
            f"{refusal.error}"
        ) from refusal.error
    if slot is not None and before is not None:
        verify_unchanged(slot, before, inputs=inputs)


def verify_unchanged(slot: ModuleSlot, before: Mapping[str, Any], *, inputs: Inputs | None = None) -> None:
    """Return if the slot is as it was when `look_at` returned `before`.

    Raises:
        AssertionError: with everything that changed.
    """
    if wrong := describe_differences(before, look_at(slot, inputs), name="slot"):
        raise AssertionError(_list("Expected a refusal that changes nothing, got:", wrong))


def find_codes(error: HotglmError) -> frozenset[str]:
    """Return every code that says why: the error's own, those of its problems and of its verdict's reasons."""
    verdict = error.verdict if isinstance(error, IncompatibleError) else None
    reasons = () if verdict is None else verdict.reasons
    return frozenset({error.code, *(p.code for p in error.problems), *(reason.code for reason in reasons)})


def look_at(slot: ModuleSlot, inputs: Inputs | None = None) -> dict[str, Any]:
    """Return copies of everything that a refusal must not change: version, generation, history, weights, answer."""
    with slot.acquire() as generation:
        return {
            "version": str(slot.version),
            "number": generation.number,
            "history": [(entry.number, str(entry.version)) for entry in slot.history],
            "state": copy.deepcopy({name: tensor.detach() for name, tensor in _state_of(generation.module).items()}),
            "output": None if inputs is None else call_with(generation.module, inputs),
        }


def assert_faults_change_nothing(
    slot: ModuleSlot,
    update: Callable[[], object],
    *,
    inputs: Inputs | None = None,
    kinds: Collection[str] = FAULT_KINDS,
) -> dict[str, int]:
    """Let each call and place of an update fail in turn, and see that nothing changes but what must (P2).

    `update` runs once for each fault: for each kind the first call fails, then the second, and so on, until an update
    comes to its end without one. Each time it must be refused with a typed error and leave the slot as it was, or the
    fault was harmless and it came through.

    Args:
        slot: the slot.
        update: updates it; runs many times, so a source that stays is needed.
        inputs: arguments of a pass whose answer must not change.
        kinds: kinds of fault, of `hotglm.testing.FAULT_KINDS`.

    Returns:
        How many faults of each kind there were, for kinds that the update comes to at all.

    Raises:
        AssertionError: an error of another type came out, or a refused update left something changed.
    """
    faults: dict[str, int] = {}
    for kind in kinds:
        nth = 1
        while nth <= _MAX_NTH and _fail_once(slot, update, inputs=inputs, kind=kind, nth=nth):
            faults[kind] = nth
            nth += 1
    return faults


def _fail_once(slot: ModuleSlot, update: Callable[[], object], *, inputs: Inputs | None, kind: str, nth: int) -> bool:
    """Run one update with one fault; return whether the fault came."""
    before, wrong = look_at(slot, inputs), ""
    with FaultPlan().inject(kind, nth) as plan:
        try:
            update()
        except HotglmError:
            changed = describe_differences(before, look_at(slot, inputs), name="slot")
            wrong = _list("a refusal after which the slot has changed:", changed) if changed else ""
        except Exception as error:  # noqa: BLE001 - that it is any other is what is looked for
            wrong = describe_exception(error)
        came = bool(plan.fired)
        plan.clear()
    if wrong:
        raise AssertionError(f"Expected a typed refusal that changes nothing when {kind} {nth} fails, got {wrong}")
    return came


@contextlib.contextmanager
def assert_no_recompile() -> Iterator[None]:
    """Expect the body to compile nothing: no frame is given to Dynamo for the first time, or again (P10).

    Run the passes that are to compile before it.

    Raises:
        AssertionError: something was compiled; with how many frames.
    """
    before = _count_frames()
    yield
    if (num := _count_frames() - before) > 0:
        raise AssertionError(
            f"Expected no compilation, got {num} frames compiled. Remedy: warm the model up before, in the same grad "
            "mode and with the same shapes; run with TORCH_LOGS=recompiles to see which guard failed."
        )


def _count_frames() -> int:
    dynamo = sys.modules.get("torch._dynamo.utils")  # imported by whoever has compiled something
    return 0 if dynamo is None else int(dynamo.counters["frames"]["total"])


def _list(headline: str, lines: Collection[str]) -> str:
    return headline + "".join(f"\n  - {line}" for line in lines)
