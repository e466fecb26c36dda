"""The golden releases of one project, where the fixture `hotglm_goldens` finds them.

Rules this module keeps: it adds nothing to `hotglm.testing.goldens` but the directory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hotglm.testing.family import ModelFamily
from hotglm.testing.golden_proof import GoldenProof, assert_goldens_load
from hotglm.testing.goldens import GoldenRelease, find_goldens, make_golden

__all__ = ["GoldenShelf"]


@dataclass(frozen=True, slots=True, kw_only=False)
class GoldenShelf:
    """A directory of golden releases.

    Attributes:
        directory: the directory; it need not exist.
    """

    directory: Path

    def find(self, name: str | None = None) -> tuple[Path, ...]:
        """Return the directories of all goldens, or of those of one model."""
        return tuple(path for path in find_goldens(self.directory) if name in (None, path.parent.name))

    def make(self, model: nn.Module, **settings: Any) -> Path:
        """Make a golden of `model`; see `hotglm.testing.make_golden`."""
        return make_golden(model, self.directory, **settings)

    def assert_all_load(
        self,
        *,
        make_model: Callable[[GoldenRelease], nn.Module] | None = None,
        expected: Mapping[str, str] | None = None,
    ) -> tuple[GoldenProof, ...]:
        """See that every golden still loads and answers as it did; see `hotglm.testing.assert_goldens_load`."""
        return assert_goldens_load(self.directory, make_model=make_model, expected=expected)

    def find_family(self, name: str, **settings: Any) -> ModelFamily:
        """Return the family of a registered model, with the weights and arguments of its goldens."""
        return ModelFamily.of_goldens(name, self.directory, **settings)
