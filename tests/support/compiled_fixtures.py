"""What every test of compiled models begins and ends with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

__all__ = ["fresh_dynamo"]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Forget what Dynamo has compiled, in front of a test and behind it."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
