"""How a slot puts a version in the live one's place: by another module, or by other bytes in the same one.

Rules this module keeps: a policy is data that the user names; what a swap in place was and did is data as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hotglm.errors import ArgumentError
from hotglm.quantity import is_amount, is_count

__all__ = ["Flip", "InPlace", "InPlaceRecord", "SwapChoice"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip:
    """Two modules over two arenas take turns; passes take no lock and never wait. The default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InPlace:
    """One module whose tensors never move; a commit exchanges their bytes between two passes.

    For traced modules, and for whoever else holds the parameters or their addresses. New passes wait while a commit
    waits for those that run, and while it copies; see docs/swap-policies.md for what else is given up.

    Attributes:
        timeout_s: how long a commit holds new passes back at most for running ones to end, in seconds; then it fails,
            names them, and nothing has changed.
        num_threads: threads that copy; None means one for each core, at most four, and one for little.
        image: where versions for a device are staged: `"device"`, beside what is live; `"host"`, in pinned memory,
            which takes next to nothing of the device; `"auto"`, on the device where it has room. An image on the host
            cannot be run, so it is proved by digests and finite values alone.
    """

    timeout_s: float = 5.0
    num_threads: int | None = None
    image: Literal["auto", "device", "host"] = "auto"

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ArgumentError: a negative time, no thread, or no such place.
        """
        is_bad = not is_amount(self.timeout_s) or (self.num_threads is not None and not is_count(self.num_threads))
        if is_bad or self.image not in ("auto", "device", "host"):
            raise ArgumentError(
                f'Expected a time of 0 s or more, at least one thread, and "auto", "device" or "host", got {self}.',
                remedy="leave num_threads out for as many as there are cores, and image to be found out.",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapChoice:
    """The policy of a slot, and why it is that one."""

    policy: Flip | InPlace
    reason: str

    def __str__(self) -> str:
        """Return it as a phrase."""
        return f"{'in place' if isinstance(self.policy, InPlace) else 'flip'}: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class InPlaceRecord:
    """What one commit in place did, as measured and compared, not as planned.

    Attributes:
        num_tensors: tensors that were exchanged, ties counted once.
        nbytes: their bytes.
        buffer_nbytes: what was held beside the two copies while it ran.
        num_waited_for: passes and sessions that were inside when the gate closed.
        waited_s: how long they took to leave, and devices to do what they had queued, in seconds.
        closed_s: how long new passes were held back in all, in seconds.
        copied_s: how long the exchange itself took, in seconds.
        num_storages: storages of the live module.
        moved: names of tensors whose storage is not where, or not as large as, it was when the slot was made.
        derived: names of tensors that no file carries and that were exchanged.
        stale: those of them whose live bytes are not the ones that were staged.
    """

    num_tensors: int
    nbytes: int
    buffer_nbytes: int
    num_waited_for: int
    waited_s: float
    closed_s: float
    copied_s: float
    num_storages: int
    moved: tuple[str, ...]
    derived: tuple[str, ...]
    stale: tuple[str, ...]

    @property
    def addresses_stable(self) -> bool:
        """Whether every storage is where it was when the slot was made, and as large."""
        return not self.moved

    @property
    def derived_refreshed(self) -> bool:
        """Whether every derived tensor has the bytes that were computed for this version."""
        return not self.stale

    def explain(self) -> str:
        """Return it as one sentence."""
        stable = "all where they were" if self.addresses_stable else f"moved: {', '.join(self.moved)}"
        return (
            f"in place: {self.nbytes} bytes of {self.num_tensors} tensors in {self.copied_s * 1e3:.2f} ms, gate closed "
            f"for {self.closed_s * 1e3:.2f} ms with {self.num_waited_for} passes inside; {self.num_storages} storages, "
            f"{stable}"
        )
