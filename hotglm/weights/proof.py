"""What a load is asked for, what it finds, and how each tensor is proved once it stands in its view.

Rules this module keeps:

- What is hashed and searched for NaN are the bytes in the arena.
- What is wrong with a value is noted, not raised, so that all tensors that fail are named in one error.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from hotglm.errors import (
    DeltaError,
    DigestMismatchError,
    NonFiniteError,
    Problem,
    SourceError,
    TensorValueError,
    shorten_repr,
)
from hotglm.weights import places
from hotglm.weights.budget import UNLIMITED, Budget, Unlimited
from hotglm.weights.digest import tensor_bytes
from hotglm.weights.download import digest_in_place
from hotglm.weights.finite import find_nonfinite
from hotglm.weights.pace import AT_WILL, AtWill, Pace
from hotglm.weights.seals import Seal
from hotglm.weights.workers import Cancellation, run_tasks

__all__ = [
    "LoadOptions",
    "Loaded",
    "Target",
    "describe_bad_bool",
    "describe_conflict",
    "describe_drift",
    "equals_view",
    "find_first_names",
    "is_bad_bool",
    "prove_tensor",
    "run_load",
    "settle_tensor",
]

_SMALL_NBYTES = 1 << 20
"""Loads below this size, in bytes, run in the staging thread itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where one name's tensor goes.

    Attributes:
        view: the tensor in the arena.
        offset: byte offset of its first element in the arena.
        key: the same for all names of tensors that are tied or overlap: one of them fills, the others are compared.
        covers: whether the view has every byte of those.
    """

    view: torch.Tensor
    offset: int
    key: str
    covers: bool = True


def _ignore(nbytes: int) -> None:
    """Take a count of bytes that nobody asked for."""
    del nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How to load.

    Attributes:
        digest: hash every tensor.
        finite: refuse NaN and infinity.
        expected: digests that the tensors must have, by name; implies hashing of those.
        num_threads: threads that read and hash, 1 or more.
        nice: how much the extra threads lower their priority.
        cancellation: stops the load at its next chunk.
        budget: how fast bytes may be moved.
        pace: what part of the time threads work.
        report: called with a number of bytes whenever that many more are done; from any worker thread.
    """

    digest: bool = True
    finite: bool = True
    expected: Mapping[str, str] = field(default_factory=dict)
    num_threads: int = 1
    nice: int = 0
    cancellation: Cancellation = field(default_factory=Cancellation)
    budget: Budget | Unlimited = UNLIMITED
    pace: Pace | AtWill = AT_WILL
    report: Callable[[int], object] = _ignore


@dataclass(slots=True, kw_only=True)
class Loaded:
    """What was loaded, and from where.

    Attributes:
        digests: by name.
        seals: what else is known of the bytes that can be copied the next time, by name.
        nbytes: of tensors that were filled.
        read_nbytes: read from files.
        copied_nbytes: copied from what was in memory already.
        found_nbytes: of tensors that stood in their place already.
        decoded_nbytes: of tensors that deltas were applied to.
        converted: names whose dtype was converted.
        drifted: names of tensors in memory that were no longer what their digests said.
        problems: what is wrong, and of which kind it is.
    """

    digests: dict[str, str] = field(default_factory=dict)
    seals: dict[str, Seal] = field(default_factory=dict)
    nbytes: int = 0
    read_nbytes: int = 0
    copied_nbytes: int = 0
    found_nbytes: int = 0
    decoded_nbytes: int = 0
    converted: list[str] = field(default_factory=list)
    drifted: list[str] = field(default_factory=list)
    problems: list[tuple[type[Exception], Problem]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, **counts: int) -> None:
        """Count bytes, by name of the attribute; workers call it side by side."""
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def raise_if_any(self, source: str) -> None:
        """Raise one error with every problem, of the gravest kind found."""
        for kind in (SourceError, DeltaError, DigestMismatchError, TensorValueError, NonFiniteError):
            if any(found is kind for found, _ in self.problems):
                raise kind(
                    f"Expected loadable tensors in {source}.",
                    problems=sorted((problem for _, problem in self.problems), key=lambda p: p.tensor or ""),
                    remedy="write it again from a good state; nothing has used these weights.",
                )


def run_load(tasks: list[Callable[[], None]], options: LoadOptions, *, nbytes: int) -> None:
    """Run tasks on as many low-priority threads as the options say; what is done sooner than a thread starts, here."""
    is_small = nbytes < _SMALL_NBYTES
    run_tasks(
        [functools.partial(_run_aside, task) for task in tasks],
        num_threads=1 if is_small else options.num_threads,
        nice=0 if is_small else options.nice,
        cancellation=options.cancellation,
        name="hotglm-load",
        within=options.pace.working,
    )


def _run_aside(task: Callable[[], None]) -> None:
    with places.active.aside():
        task()


def find_first_names(names: Mapping[str, object], targets: Mapping[str, Target]) -> dict[str, str]:
    """Return, for each key, the name that fills it: one that covers all of its bytes."""
    first: dict[str, str] = {}
    for name in sorted(names, key=lambda name: not targets[name].covers):
        first.setdefault(targets[name].key, name)
    return first


def equals_view(view: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Tell whether a view has the bytes of a tensor, once that is converted to its dtype."""
    same = tensor if tensor.dtype is view.dtype else tensor.to(view.dtype)
    return torch.equal(tensor_bytes(view), tensor_bytes(same))


def describe_conflict(name: str, target: Target) -> Problem:
    """Return the problem of a further name whose values differ from those of the first."""
    message = f"Expected the values of the tensor that shares its memory, {shorten_repr(target.key)}, got others"
    return Problem(code="TIE_CONFLICT", message=message, tensor=name)


def describe_drift(name: str) -> Problem:
    """Return the problem of a live tensor that something has written since it was loaded."""
    message = "Expected the live tensor to have the bytes that it was loaded with, got others"
    return Problem(code="LIVE_CHANGED", message=message, tensor=name)


def is_bad_bool(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor of truth values has bytes that are none."""
    return tensor.dtype is torch.bool and bool(tensor.numel()) and int(tensor.view(torch.uint8).max().item()) > 1


def describe_bad_bool(name: str) -> Problem:
    """Return the problem of such a tensor."""
    return Problem(code="BAD_BOOL", message="Expected bytes 0 and 1 in a BOOL tensor, got others", tensor=name)


def prove_tensor(
    name: str,
    target: Target,
    *,
    digest: str | None,
    loaded: Loaded,
    options: LoadOptions,
    source: torch.Tensor | None = None,
    mismatch: str = "DIGEST_MISMATCH",
) -> None:
    """Hash the tensor where that is wanted and not done yet, and note what is wrong with its values.

    `mismatch` is the code of the problem where it has another digest than was promised.
    """
    expected = options.expected.get(name)
    if digest is None and (options.digest or expected is not None):
        digest = digest_in_place(target.view, cancellation=options.cancellation)
    if digest is not None:
        loaded.digests[name] = digest
    if expected is not None and source is not None and source.dtype is not target.view.dtype:
        digest = digest_in_place(
            source, cancellation=options.cancellation
        )  # what was promised is what was offered, not what it was converted to
    if expected is not None and digest != expected:
        loaded.problems.append(
            (
                DigestMismatchError,
                Problem(
                    code=mismatch,
                    message=f"Expected digest {expected}, got {digest}",
                    tensor=name,
                    expected=expected,
                    found=digest,
                ),
            )
        )
    _find_bad_values(name, target.view, loaded=loaded, finite=options.finite)


def settle_tensor(
    name: str, target: Target, *, tensor: torch.Tensor, is_first: bool, loaded: Loaded, options: LoadOptions
) -> None:
    """Count, hash and prove one tensor that came as a tensor; where it is a second name, compare it with the first."""
    if tensor.dtype is not target.view.dtype:
        loaded.converted.append(name)
    if not is_first and not equals_view(target.view, tensor):
        loaded.problems.append((TensorValueError, describe_conflict(name, target)))
    prove_tensor(name, target, digest=None, loaded=loaded, options=options, source=tensor)
    loaded.add(nbytes=target.view.numel() * target.view.element_size() if is_first else 0)
    options.report(tensor.numel() * tensor.element_size())


def _find_bad_values(name: str, view: torch.Tensor, *, loaded: Loaded, finite: bool) -> None:
    if is_bad_bool(view):
        loaded.problems.append((TensorValueError, describe_bad_bool(name)))
    if finite and (bad := find_nonfinite(view)) is not None:
        problem = Problem(
            code="NONFINITE",
            message=f"Expected finite values, got {bad.num_elements} NaN or infinite of {view.numel()}, "
            f"the first at index {bad.first_index}",
            tensor=name,
            expected=0,
            found=bad.num_elements,
        )
        loaded.problems.append((NonFiniteError, problem))
