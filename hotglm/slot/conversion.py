"""Whose checkpoints a live module reads: libraries that name tensors otherwise in files than in modules.

Rules this module keeps:

- A module is recognised by its base class, and only in a library that is loaded already: nothing is imported to find
  out that a module is somebody else's.
- The integration that knows the library is named here as text, and imported when a source is staged for such a module:
  the one way in which a lower layer reaches a higher one (`docs/adr/0008-conversions.md`). Without its extra, what fits
  by name is used as it is, and the rest is refused with the name of the extra.
- What a migration made of a source is converted after it.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from typing import Protocol, cast

from torch import nn

from hotglm.comparison import find_unfilled
from hotglm.contract import Contract
from hotglm.errors import MissingExtraError
from hotglm.slot.source import Offer

__all__ = ["Integration", "convert_offer"]


class Integration(Protocol):
    """What the module of an integration defines."""

    def convert_offer(self, offer: Offer, *, module: nn.Module, contract: Contract) -> Offer:
        """Return `offer` as it is for `module`, which makes `contract`; refuse what is not meant for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Library:
    """A library of modules: where its base class is defined, and which module of ours knows it."""

    owner: str
    base: str
    integration: str


_LIBRARIES = (
    _Library(
        owner="transformers.modeling_utils", base="PreTrainedModel", integration="hotglm.integrations.transformers"
    ),
)


def convert_offer(offer: Offer, *, module: nn.Module, contract: Contract) -> Offer:
    """Return `offer` in the names and shapes of `module`, as the module's library reads its own checkpoints.

    Args:
        offer: as its source was opened, or as a migration left it.
        module: the structure that is to hold it.
        contract: of `module`.

    Raises:
        MissingExtraError: it does not fit as it is, and the integration's extra is not installed.
        HotglmError: what the integration refuses.
    """
    library = _find_library(module)
    if library is None:
        return offer
    try:
        integration = cast(Integration, importlib.import_module(library.integration))
    except MissingExtraError:
        if next(find_unfilled(contract, offer.contract), None) is None:
            return offer
        raise
    return integration.convert_offer(offer, module=module, contract=contract)


def _find_library(module: nn.Module) -> _Library | None:
    for library in _LIBRARIES:
        base = getattr(sys.modules.get(library.owner), library.base, None)
        if isinstance(base, type) and isinstance(module, base):
            return library
    return None
