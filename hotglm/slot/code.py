"""Which code holds a staged version: the live structure again, a registered class, or the module that was offered.

Rules this module keeps:

- A class registered for exactly the version that is staged is preferred: that is new code.
- Else the live structure (its class built anew, if the offer brings another config), if it can read the version and its
  layout fits, by way of a migration where one lies between; else another registered class that says it reads that
  version. If nothing fits, the live structure is named, so that the verdict can say what is wrong with it.
- A slot that was given migrations keeps its own code: what arrives is brought to it, whatever classes are registered.
- Building a class draws no random numbers and touches no memory for weights: its initialisers are skipped in this
  thread alone, because every weight is filled from the source afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from hotglm.comparison import find_unfilled
from hotglm.contract import Contract
from hotglm.errors import DefinitionError, MigrationError, NoPathError
from hotglm.migration.registry import Migrations
from hotglm.model.building import unfilled
from hotglm.model.derived import Marks
from hotglm.model.inspection import contract_of
from hotglm.model.registry import Definition, find_definition, find_definitions, find_migrations, read_config
from hotglm.slot.conversion import convert_offer
from hotglm.slot.generation import Generation
from hotglm.slot.migrating import (
    find_gap,
    hides_values,
    migrate_config,
    migrate_offer,
    stamp_offer,
    upgrade_offer,
    verify_told,
)
from hotglm.slot.source import Offer
from hotglm.version import Version, VersionRange
from hotglm.weights.dtypes import TORCH_DTYPES

__all__ = ["Code", "Question", "choose_code"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """A module to copy structurally, with its contract, and what it is to hold.

    Attributes:
        module: the structure; its weights are not used.
        contract: what it promises.
        version: the version whose layout it has.
        reads: the versions of weights it can read; None for all that fit.
        is_new: whether it is not the live generation's own structure.
        offer: what it is offered, after the migration to its version.
        stamped: the version of the offer, where it was concluded from its layout.
        gap: why there is no migration to its version, where one was looked for.
        marks: its loose tensors as they were before passes ran in it; None for code that has run no pass here.
    """

    module: nn.Module
    contract: Contract
    version: Version
    reads: VersionRange | None
    is_new: bool
    offer: Offer
    stamped: Version | None = None
    gap: NoPathError | None = None
    marks: Marks | None = None

    def can_hold(self, version: Version | None) -> bool:
        """Whether it can read `version`, and what it is offered fills it."""
        readable = self.reads is None or version is None or version in self.reads
        return (
            readable
            and not hides_values(self.gap)
            and next(find_unfilled(self.contract, self.offer.contract), None) is None
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What code is looked for.

    Attributes:
        offer: the opened source, as it is.
        live: the generation that serves.
        version: of the offer's weights, where it is known.
        migrations: those that the slot was given, if it was.
        config: what is to be built from in place of the offer's config; for the code's own version.
        is_stamped: whether `version` was concluded from the layout.
        converts_dtypes: whether what is offered will be converted to the code's dtypes.
    """

    offer: Offer
    live: Generation
    version: Version | None
    migrations: Migrations | None = None
    config: Mapping[str, Any] | None = None
    is_stamped: bool = False
    converts_dtypes: bool = False

    def migrations_of(self, definition: Definition | None) -> Migrations | None:
        """Return the migrations that lead to a class; None where there is no step."""
        found = self.migrations
        if found is None and definition is not None:
            found = find_migrations(definition.name)
        return found if found is not None and found.history() else None


_Adapted = tuple[Offer, NoPathError | None]
"""An offer after its migration, and why it could not be migrated."""


def choose_code(question: Question) -> Code:
    """Return the code that is to hold the offer (see the rules above).

    Raises:
        DefinitionError: the chosen class cannot be built from the config.
        MigrationError: a migration lies between, and is ambiguous or does not fit.
        UnknownVersionError: weights without a version, which do not fit, and of which no one layout is known.
        IncompatibleError: torch's own modules would have to compute with the values.
    """
    offer, live, version = question.offer, question.live, question.version
    if offer.module is not None:
        return _take_module(question, offer.module)
    own = find_definition(type(live.module))
    others = [d for d in find_definitions(own.name if own else live.name) if d is not own]
    if question.migrations is not None:
        others = []
    is_same_release = version is None or version.public == live.version.public
    exact = None if is_same_release else _find_exact(others, version)
    if exact is not None:
        return _build(exact, question)
    if version is None:
        return _choose_unversioned(question, own)
    return _choose_reader(question, others, version)


def _take_module(question: Question, module: nn.Module) -> Code:
    definition = question.offer.definition
    version = definition.version if definition is not None else question.version or question.live.code_version
    return Code(
        module=module,
        contract=contract_of(module),
        version=version,
        reads=definition.reads if definition is not None else None,
        is_new=True,
        offer=question.offer,
    )


def _choose_unversioned(question: Question, own: Definition | None) -> Code:
    """Return the live structure, for weights that carry no version: as they are, or stamped where they do not fit."""
    migrations, live = question.migrations_of(own), question.live
    if migrations is None:
        return _current(question)
    code_version = own.version if own is not None else live.code_version
    with contextlib.suppress(DefinitionError):  # its config is one of another version
        current = _current(question)
        if current.can_hold(None):
            verify_told(question.offer, migrations, code=code_version)
            return current
    stamped = stamp_offer(question.offer, migrations, code=code_version, contract=live.contract)
    return replace(_current(replace(question, version=stamped, is_stamped=True)), stamped=stamped)


def _choose_reader(question: Question, others: list[Definition], version: Version) -> Code:
    """Return the live structure or the newest other class that reads `version` and holds the offer.

    What cannot be built or migrated is passed over, if something else holds the offer.
    """
    failure: DefinitionError | MigrationError | None = None
    found: list[Code] = []
    try:
        found.append(_current(question))
    except MigrationError as error:
        failure = error
    for definition in others:
        if found and found[-1].can_hold(version):
            return found[-1]
        if definition.reads is not None and version not in definition.reads:
            continue
        try:
            found.append(_build(definition, question))
        except (DefinitionError, MigrationError) as error:
            failure = failure or error
    if found and found[-1].can_hold(version):
        return found[-1]
    if failure is not None:
        raise failure
    return found[0]


def _find_exact(definitions: list[Definition], version: Version | None) -> Definition | None:
    same = [d for d in definitions if version is not None and d.version.public == version.public]
    return next((d for d in same if d.version == version), same[0] if same else None)


def _current(question: Question) -> Code:
    """Return the live structure, or its own class built anew where the offer brings another config."""
    live = question.live
    own = find_definition(type(live.module))
    adapted = _adapt(question, own)
    offer, gap = adapted
    if own is None or own.config is None or offer.config is None:
        return _reuse(question, own, adapted)
    try:
        config = own.make_config(offer.config)
    except DefinitionError:
        if gap is None:
            raise
        raise gap from None  # it does not fit because no migration leads here
    # A config that changes no shape (heads, an epsilon, an activation) changes answers all the same.
    is_same = config == getattr(live.module, "config", None)
    return _reuse(question, own, adapted) if is_same else _build(own, question, adapted)


def _reuse(question: Question, own: Definition | None, adapted: _Adapted) -> Code:
    live = question.live
    offer, gap = adapted
    return Code(
        module=live.module,
        contract=live.contract,
        version=own.version if own is not None else live.code_version,
        reads=own.reads if own else None,
        is_new=False,
        offer=upgrade_offer(convert_offer(offer, module=live.module, contract=live.contract), live.module),
        gap=gap,
        marks=live.marks,
    )


def _adapt(question: Question, definition: Definition | None) -> _Adapted:
    """Return the offer as it is for a class, or for the live structure of none, and why it could not be migrated."""
    offer, gap = question.offer, None
    migrations, version = question.migrations_of(definition), question.version
    code_version = definition.version if definition is not None else question.live.code_version
    if migrations is not None and version is not None:
        try:
            offer = migrate_offer(
                offer,
                migrations,
                version=version,
                code=code_version,
                takes_config=definition is not None and definition.config is not None and question.config is None,
                is_stamped=question.is_stamped,
            )
        except NoPathError as error:
            gap = find_gap(error, offer, migrations, version=version, code=code_version)
    if question.config is not None:
        offer = replace(offer, config=MappingProxyType(dict(question.config)))
    return offer, gap


def _build(definition: Definition, question: Question, adapted: _Adapted | None = None) -> Code:
    offer, gap = adapted or _adapt(question, definition)
    live = question.live
    config = offer.config if offer.config is not None else _find_live_config(question, definition)
    with unfilled():
        module = definition.build(config)
    dtype = _find_only_dtype(offer.contract, live.contract)
    if dtype is None and question.converts_dtypes and _find_only_dtype(contract_of(module)) is not None:
        dtype = _find_only_dtype(live.contract)  # what the file is in says nothing then
    if dtype is not None:
        module = module.to(dtype)
    frozen = {name for name, parameter in live.module.named_parameters() if not parameter.requires_grad}
    for name, parameter in module.named_parameters():
        if name in frozen:
            parameter.requires_grad = False
    contract = contract_of(module)
    return Code(
        module=module,
        contract=contract,
        version=definition.version,
        reads=definition.reads,
        is_new=True,
        offer=upgrade_offer(convert_offer(offer, module=module, contract=contract), module),
        gap=gap,
    )


def _find_live_config(question: Question, definition: Definition) -> Mapping[str, Any] | None:
    """Return the config that serves, brought to the version of the class that is to be built from it."""
    config = read_config(question.live.module)
    own, migrations = find_definition(type(question.live.module)), question.migrations_of(definition)
    if own is None or migrations is None:
        return config
    return migrate_config(config, migrations, version=own.version, code=definition.version)


def _find_only_dtype(*contracts: Contract) -> torch.dtype | None:
    """Return the one floating-point dtype that all of `contracts` are in, as after `model.half()`."""
    used = {
        TORCH_DTYPES[spec.dtype]
        for contract in contracts
        for spec in contract.state.values()
        if TORCH_DTYPES[spec.dtype].is_floating_point
    }
    return used.pop() if len(used) == 1 else None
