"""Whether a source brings the wrappers (quantised weights) that the code for it holds.

Rules this module keeps:

- The bytes inside a wrapper mean something only with its class and context, which no file carries. So they are taken
  from wrappers that are alike, and from nothing else; plain weights for a wrapper are quantised by whoever knows how
  (slot/quantizing.py).
- Where the live code and the new one have a wrapper of one name, these are alike too.
"""

from __future__ import annotations

from torch import nn

from hotglm.errors import Problem, UnswappableError
from hotglm.model.wrappers import explain_difference, find_wrapper_specs, name_kind
from hotglm.slot.source import Offer

__all__ = ["verify_wrappers"]


def verify_wrappers(module: nn.Module, *, offer: Offer, live: nn.Module) -> None:
    """Refuse an offer that does not bring, for each wrapper of `module`, one that is alike.

    Args:
        module: the code that is to hold what is offered; perhaps the offered module itself.
        offer: after its migration.
        live: the module that serves.

    Raises:
        UnswappableError: naming every parameter and buffer that is another wrapper, or none.
    """
    serving = find_wrapper_specs(live)
    held = serving if module is live else find_wrapper_specs(module)
    problems = []
    for name, spec in held.items():
        found = offer.wrappers.get(name)
        if found is None:
            problems.append(_refuse(name, f"{name_kind(spec)} of {', '.join(spec.inner)}", _describe(name, offer)))
        elif difference := explain_difference(serving.get(name, spec), found) or explain_difference(spec, found):
            problems.append(_refuse(name, *difference))
    if problems:
        raise UnswappableError(
            "Expected quantised weights like those of the code that holds them, got others.",
            problems=problems,
            remedy="load the weights into a plain module, quantise it with the same settings, and pass that: "
            "slot.update(module), or its state_dict(); or tell the slot how: ModuleSlot(requantize=Requantize(...)).",
        )


def _describe(name: str, offer: Offer) -> str:
    spec = offer.contract.state.get(name)
    if spec is not None:
        return f"{spec.dtype} of shape {list(spec.shape)}"
    has_inner = any(other.startswith(f"{name}.") for other in offer.contract.state)
    return "inner tensors without their context" if has_inner else "none"


def _refuse(name: str, expected: str, found: str) -> Problem:
    message = f"Expected {expected}, got {found}"
    return Problem(code="CANNOT_SWAP_WRAPPED", message=message, tensor=name, expected=expected, found=found)
