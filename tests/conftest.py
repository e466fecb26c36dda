"""What every test runs under: Hypothesis profiles, and GPU tests skipped where there is no device."""

from __future__ import annotations

import pytest
from hypothesis import settings

pytest_plugins = ["hotglm.pytest_plugin"]  # by name, so that a checkout that is not installed has it too

# Deterministic in CI; `make test-all` searches longer (`--hypothesis-profile=long`), still from the same seed.
settings.register_profile("short", derandomize=True, deadline=None, database=None)
settings.register_profile("long", derandomize=True, deadline=None, database=None, max_examples=2000)
settings.load_profile("short")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where torch sees no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
