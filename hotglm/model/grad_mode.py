"""The autograd and autocast modes of a thread: read in one, applied in another.

Rules this module keeps: new threads inherit none of these modes, and caches and compiled code are keyed by them; so
whoever runs a pass on behalf of somebody else applies the modes of that somebody.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

__all__ = ["GradMode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GradMode:
    """The autograd and autocast modes of a thread, which new threads do not inherit."""

    grad: bool
    inference: bool
    autocast: bool
    autocast_dtype: torch.dtype
    cuda_autocast: bool
    cuda_autocast_dtype: torch.dtype

    @classmethod
    def current(cls) -> GradMode:
        """Return those of the calling thread."""
        return cls(
            grad=torch.is_grad_enabled(),
            inference=torch.is_inference_mode_enabled(),
            autocast=torch.is_autocast_enabled("cpu"),
            autocast_dtype=torch.get_autocast_dtype("cpu"),
            cuda_autocast=torch.is_autocast_enabled("cuda"),
            cuda_autocast_dtype=torch.get_autocast_dtype("cuda"),
        )

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Run the body of a `with` in these modes."""
        with (
            torch.inference_mode(self.inference),
            torch.set_grad_enabled(self.grad and not self.inference),
            torch.autocast("cpu", dtype=self.autocast_dtype, enabled=self.autocast),
            torch.autocast("cuda", dtype=self.cuda_autocast_dtype, enabled=self.cuda_autocast),
        ):
            yield
