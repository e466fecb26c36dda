"""Which code holds a staged version: the live structure again, a registered class, or the module that was offered.

Rules this module keeps:

- A class registered for exactly the version that is staged is preferred: that is new code.
- Else the live structure (its class built anew, if the offer brings another config), if it can read the version and its
  layout fits; else another registered class that says it
  reads that version. If nothing fits, the live structure is named, so that the verdict can say what is wrong with it.
- Building a class draws no random numbers and touches no memory for weights: its initialisers are skipped in this
  thread alone, because every weight is filled from the source afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from hotglm.comparison import find_unfilled
from hotglm.contract import Contract
from hotglm.errors import DefinitionError
from hotglm.model.derived import Marks
from hotglm.model.inspection import contract_of
from hotglm.model.registry import Definition, find_definition, find_definitions, read_config
from hotglm.slot.generation import Generation
from hotglm.slot.source import Offer
from hotglm.version import Version, VersionRange
from hotglm.weights.dtypes import TORCH_DTYPES

__all__ = ["Code", "choose_code"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """A module to copy structurally, with its contract.

    Attributes:
        module: the structure; its weights are not used.
        contract: what it promises.
        reads: the versions of weights it can read; None for all that fit.
        is_new: whether it is not the live generation's own structure.
        marks: its loose tensors as they were before passes ran in it; None for code that has run no pass here.
    """

    module: nn.Module
    contract: Contract
    reads: VersionRange | None
    is_new: bool
    marks: Marks | None = None


def choose_code(offer: Offer, *, live: Generation, version: Version | None) -> Code:
    """Return the code that is to hold `offer` (see the rules above).

    Raises:
        DefinitionError: the chosen class cannot be built from the config.
    """
    if offer.module is not None:
        reads = offer.definition.reads if offer.definition else None
        return Code(module=offer.module, contract=contract_of(offer.module), reads=reads, is_new=True)
    own = find_definition(type(live.module))
    others = [d for d in find_definitions(own.name if own else live.name) if d is not own]
    is_same_release = version is None or version.public == live.version.public
    exact = None if is_same_release else _find_exact(others, version)
    if exact is not None:
        return _build(exact, offer, live)
    current = _current(offer, live)
    if version is None or _can_hold(current, offer, version):
        return current
    return _find_reader(others, offer, live, version) or current


def _find_exact(definitions: list[Definition], version: Version | None) -> Definition | None:
    same = [d for d in definitions if version is not None and d.version.public == version.public]
    return next((d for d in same if d.version == version), same[0] if same else None)


def _find_reader(definitions: list[Definition], offer: Offer, live: Generation, version: Version) -> Code | None:
    """Return the newest other class that reads `version` and holds the offer; pass over what cannot be built."""
    failure: DefinitionError | None = None
    for definition in definitions:
        if definition.reads is not None and version not in definition.reads:
            continue
        try:
            built = _build(definition, offer, live)
        except DefinitionError as error:
            failure = failure or error
            continue
        if _can_hold(built, offer, version):
            return built
    if failure is not None:
        raise failure
    return None


def _current(offer: Offer, live: Generation) -> Code:
    """Return the live structure, or its own class built anew where the offer brings another config."""
    own = find_definition(type(live.module))
    if own is not None and own.config is not None and offer.config is not None:
        config = own.make_config(offer.config)
        # A config that changes no shape (heads, an epsilon, an activation) changes answers all the same.
        return _build(own, offer, live) if config != getattr(live.module, "config", None) else _reuse(live)
    return _reuse(live)


def _reuse(live: Generation) -> Code:
    own = find_definition(type(live.module))
    reads = own.reads if own else None
    return Code(module=live.module, contract=live.contract, reads=reads, is_new=False, marks=live.marks)


def _can_hold(code: Code, offer: Offer, version: Version) -> bool:
    readable = code.reads is None or version in code.reads
    return readable and next(find_unfilled(code.contract, offer.contract), None) is None


def _build(definition: Definition, offer: Offer, live: Generation) -> Code:
    config: Mapping[str, Any] | None = offer.config if offer.config is not None else read_config(live.module)
    with torch.inference_mode(mode=False), torch.enable_grad(), _SkipInitialisers():
        module = definition.build(config)
    dtype = _find_shared_dtype(offer, live)
    if dtype is not None:
        module = module.to(dtype)
    frozen = {name for name, parameter in live.module.named_parameters() if not parameter.requires_grad}
    for name, parameter in module.named_parameters():
        if name in frozen:
            parameter.requires_grad = False
    return Code(module=module, contract=contract_of(module), reads=definition.reads, is_new=True)


def _find_shared_dtype(offer: Offer, live: Generation) -> torch.dtype | None:
    """Return the one floating-point dtype that both the live module and the offer are in, as after `model.half()`."""
    used = {
        TORCH_DTYPES[spec.dtype]
        for contract in (offer.contract, live.contract)
        for spec in contract.state.values()
        if TORCH_DTYPES[spec.dtype].is_floating_point
    }
    return used.pop() if len(used) == 1 else None


_FILLS = frozenset(
    {"normal_", "uniform_", "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "random_"}
    | {"kaiming_normal_", "kaiming_uniform_"}  # torch hides what these call from the mode
)
_DRAWS = frozenset({"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"})


class _SkipInitialisers(TorchFunctionMode):
    """Leaves parameters as they were allocated and draws the rest from its own generator, in this thread only.

    The service's generator must not move because a model is loaded (its dropout would change), and weights that are
    about to be filled from a source need no values.
    """

    def __init__(self) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(0)

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, options = getattr(func, "__name__", ""), dict(kwargs or {})
        filled = args[0] if args else options.get("tensor")
        if name in _FILLS and isinstance(filled, nn.Parameter):
            return filled
        if args and name.removesuffix("_like") in _DRAWS - {name}:  # not every torch gives these a generator
            options = {"dtype": args[0].dtype, "device": args[0].device, **options}
            func, args = getattr(torch, name.removesuffix("_like")), (*args[1:], args[0].shape)
        elif name not in _FILLS | _DRAWS:
            return func(*args, **options)
        if options.get("generator") is None:
            options["generator"] = self._generator
        return func(*args, **options)
