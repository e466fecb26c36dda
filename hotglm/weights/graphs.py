"""What hotglm asks of a device that captures graphs: `weights/cuda_graphs.py` implements it, and a fake in tests does.

Rules this module keeps: the orders are those of [Note: streams] in weights/device.py. A graph is work of one stream
(O1): all of it comes after what was submitted to that stream before its replay, and before what is submitted later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import torch

__all__ = ["Recorder", "Recording", "Run"]

Run: TypeAlias = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]
"""One pass: takes its tensors, returns those that it gives back."""


class Recording(Protocol):
    """One captured pass. Its memory is its own, and is given back when nobody refers to it any more.

    Attributes:
        inputs: where a replay reads the tensors of a pass.
        outputs: where it writes those that the pass gives back.
    """

    @property
    def inputs(self) -> Sequence[torch.Tensor]:
        """As above."""
        ...

    @property
    def outputs(self) -> Sequence[torch.Tensor]:
        """As above."""
        ...

    def replay(self) -> None:
        """Submit the pass to the current stream."""
        ...


class Recorder(Protocol):
    """Captures passes of one device. Any thread may call any method; one captures at a time."""

    def capture(self, run: Run, samples: Sequence[torch.Tensor]) -> Recording:
        """Run `run` a few times, then once more to capture it, on tensors like `samples`.

        On streams of its own, with nobody else's work waited for, and without an end to what others capture.
        Whatever `run` raises is raised; the device can then be used as before.
        """
        ...

    def find_stream(self) -> Any:
        """Return the current stream of the calling thread, to be compared and followed; None while it is captured."""
        ...

    def follow(self, stream: Any) -> None:
        """Let what is submitted to the current stream from now on begin after all that `stream` was given (O2)."""
        ...

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Submit a copy to the current stream."""
        ...

    def clone(self, tensor: torch.Tensor) -> torch.Tensor:
        """Submit a copy to fresh memory to the current stream, and return it."""
        ...
