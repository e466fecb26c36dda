"""Whether an error says that there is no more memory, of the processor or of a device.

Rules this module keeps: torch's allocator of the processor raises a plain `RuntimeError`, which is told by its text.
"""

from __future__ import annotations

import torch

from hotglm.problem import describe_exception

__all__ = ["is_out_of_memory"]


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether `error` is raised where memory cannot be had."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "can't allocate memory" in describe_exception(error, limit=10_000)
