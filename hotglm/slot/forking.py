"""Slots in a process that forks: what is settled before, and what is made anew in the child.

Rules this module keeps:

- A fork never catches weights that are half written: it waits until no byte is being written in place.
- Threads that fork at once take turns, or one would let go of what the other waits for.
- A child has only the thread that forked: locks that others held are replaced, and their passes forgotten.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref

import torch

from hotglm.slot.core import SlotCore

__all__ = ["follow_forks"]

_cores: weakref.WeakSet[SlotCore] = weakref.WeakSet()
_forking: list[SlotCore] = []
"""Those that wait for the end of a fork that is under way."""

_turn = threading.RLock()  # a lock that only its owner can give back


def follow_forks(core: SlotCore) -> None:
    """Keep a slot usable across forks for as long as it lives."""
    _cores.add(core)


def _before() -> None:
    _turn.acquire()
    for core in list(_cores):
        core.admission.begin_fork()
        _forking.append(core)


def _after_in_parent() -> None:
    while _forking:
        _forking.pop().admission.end_fork()
    with contextlib.suppress(RuntimeError):  # an interrupt came before it was ours
        _turn.release()


def _after_in_child() -> None:
    """Make every slot usable in a forked child: its locks may be held by threads that do not exist here.

    A child of a process that has run torch in parallel hangs in its first matrix product, because OpenMP waits for
    worker threads that were not forked. One thread needs no workers, so the child computes with one; it may raise the
    number again once it knows that the parent had none.
    """
    global _turn  # noqa: PLW0603 - the thread that may wait for it does not exist here
    _turn = threading.RLock()
    cores = list(_cores)
    _forking.clear()
    for core in cores:
        core.reset_after_fork()
    if cores:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
