"""How plain weights get into a slot whose module is quantised: what the user says, and what is kept of it.

Rules this module keeps: data; nothing is called here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hotglm.errors import ArgumentError

__all__ = ["PlainOrigin", "QuantizedFrom", "Requantize"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Requantize:
    """What a slot does with plain weights, whose module is quantised: `ModuleSlot(..., requantize=Requantize(...))`.

    What is offered is held against the plain model, loaded and proved as in a slot of that, and then quantised, in the
    stage's thread while the live version serves; what comes out is held against what is live.

    Attributes:
        quantize: called with a plain model that holds the new weights, in the grad mode of the service and without
            autocast. Quantises it in place, or returns another module. The same weights must give the same module.
        build: returns the model as it is before it is quantised. Only its structure is used: its weights are neither
            read nor written, so parameters are not initialised, they may be on the meta device, and it may be the same
            module each time. None builds the class of the live module, which `@versioned` has declared, from its
            config.
    """

    quantize: Callable[[nn.Module], nn.Module | None]
    build: Callable[[], nn.Module] | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be called.

        Raises:
            ArgumentError: naming the fields.
        """
        wrong: list[str] = [
            *(["quantize"] if not callable(self.quantize) else []),
            *(["build"] if self.build is not None and not callable(self.build) else []),
        ]
        if wrong:
            raise ArgumentError(
                f"Expected functions to build and to quantise a model, got bad {', '.join(wrong)}.",
                remedy="pass Requantize(build=Model, quantize=lambda model: quantize_(model, config)).",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedFrom:
    """The plain weights that what is live was quantised from.

    Attributes:
        digest: of all of them, as a slot of the plain model would have it; None where hashing was turned off.
        digests: of each tensor, by its name in the plain model.
        nbytes: their bytes.
    """

    digest: str | None
    digests: Mapping[str, str] = field(default_factory=dict)
    nbytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlainOrigin:
    """What a generation came from: plain weights that were quantised here, or what the slot was made with.

    Attributes:
        weights: for the receipt; None for what the slot was made with.
        model: class of the plain model, with which later weights are compared. None for that of `build`.
        config: the config that it was built from, if it has one.
        values: plain values of the quantised module as it came to be, before any pass; see `note_values`.
    """

    weights: QuantizedFrom | None = None
    model: type[nn.Module] | None = None
    config: Mapping[str, Any] | None = None
    values: Mapping[str, str] = field(default_factory=dict)
