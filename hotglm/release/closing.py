"""What is open until it is closed: a context manager that closes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

__all__ = ["Closing"]


class Closing(ABC):
    """Something that holds descriptors, locks or threads until it is closed."""

    __slots__ = ()

    @abstractmethod
    def close(self) -> None:
        """Give up what it holds. Again does nothing."""

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it, whatever the body did."""
        self.close()
