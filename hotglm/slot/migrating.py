"""Which migration stands between an offer and the code that is to hold it, and what the offer looks like after it.

Rules this module keeps:

- Config first, then the layout, on headers alone: whoever decides afterwards decides on what will be there.
- An offer that no step concerns is returned as it is. A path that does not exist is no error here but a gap, which the
  verdict names if it refuses; one that is ambiguous, or that does not fit the tensors, is an error.
- Weights without a version are never guessed at: they are used as they are where they fit, else stamped where exactly
  one known layout leads to the code's, else refused.
- That tensors fit proves nothing where a step changes values and neither names nor shapes ([Note: silent steps]).

[Note: silent steps]
A factor, a square transpose or a free function may leave every name, dtype and shape as it was. Where such a step lies
between an offer and the code, or may lie there because a file carries no version, tensors that fit may still be those
of the other layout. They are refused, then, unless a path says what they are: to load them would give wrong answers and
no error. A mapping without a version is taken to come from the code that runs, as ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import nn

from hotglm import seam
from hotglm.contract import Contract
from hotglm.errors import MigrationError, MigrationStepError, NoPathError, Problem, UnknownVersionError
from hotglm.migration.expression import Expression, Source, TensorSpec
from hotglm.migration.plan import MigrationPath, StatePlan
from hotglm.migration.registry import Migrations
from hotglm.migration.step import Hop, Step
from hotglm.model.module_versions import carry_module_versions, plan_upgrade
from hotglm.slot.source import Migration, Offer
from hotglm.verdict import Finding
from hotglm.version import Version

__all__ = ["describe_gap", "migrate_config", "migrate_offer", "stamp_offer", "upgrade_offer"]


_SILENT = "SILENT_STEP"
_NUM_LINES = 40
"""Lines of a path that a receipt keeps."""


def migrate_offer(
    offer: Offer, migrations: Migrations, *, version: Version, code: Version, takes_config: bool, is_stamped: bool
) -> Offer:
    """Return `offer` as it will be for code of version `code`; the offer itself where no step lies between.

    Args:
        offer: as its source was opened.
        migrations: the steps that are known.
        version: of its weights.
        code: version of the code.
        takes_config: whether the code is built from a config.
        is_stamped: whether `version` was concluded from the layout.

    Raises:
        NoPathError: no steps lead from one to the other. AmbiguousPathError: several ways do.
        MigrationStepError: a step does not fit the config or the tensors; all that it finds is named.
    """
    path = migrations.plan(version, code)
    if path.is_empty:
        return offer
    config = offer.config
    if config is not None and takes_config:
        config = MappingProxyType(path.migrate_config(dict(config)))
    plan = _plan_state(path, offer)
    for _ in path.hops:
        seam.active.reach("migration_step")
    lines = _describe(path, version, is_stamped=is_stamped)
    return _with_plan(offer, plan, config=config, lines=lines)


def _plan_state(path: MigrationPath, offer: Offer) -> StatePlan:
    """Return the plan for the tensors of an offer, those of a mapping that are one tensor under its first name."""
    specs = _find_specs(offer.contract)
    untied = _find_untied(offer)
    if len(untied) < len(specs):
        # A file has a tied tensor once, and so migrations are written for its first name; some name the others.
        with contextlib.suppress(MigrationStepError):
            return path.plan_state({name: specs[name] for name in untied})
    return path.plan_state(specs)


def _find_untied(offer: Offer) -> list[str]:
    """Return the names of an offer, without further names of one tensor of a mapping."""
    places: dict[object, str] = {}
    for name in offer.contract.state:
        tensor = None if offer.tensors is None else offer.tensors[name]
        if tensor is None or tensor.numel() == 0:
            places[name] = name
        else:
            place = (str(tensor.device), tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            places.setdefault(place, name)
    return list(places.values())


def upgrade_offer(offer: Offer, module: nn.Module) -> Offer:
    """Return `offer` as torch's own modules bring it up to date, where it is older than they are.

    Raises:
        IncompatibleError: they would compute with its values; all of them are named.
    """
    if offer.module_versions is None:
        return offer
    outputs = _find_outputs(offer)
    versions: Mapping[str, int | None] = offer.module_versions
    if offer.migration is not None:
        versions = carry_module_versions(outputs, offer.module_versions)
    upgrade = plan_upgrade(module, outputs, versions)
    if upgrade is None:
        return offer
    before = offer.migration
    sources = before.plan.sources if before is not None else _find_specs(offer.contract)
    lines = (*(before.lines if before is not None else ()), *upgrade.lines)
    return _with_plan(
        offer,
        StatePlan(outputs=upgrade.outputs, sources=sources),
        config=offer.config,
        lines=lines,
    )


def stamp_offer(offer: Offer, migrations: Migrations, *, code: Version, contract: Contract) -> Version:
    """Return the version of the one known layout that leads from the tensors of `offer` to those of the code.

    Raises:
        UnknownVersionError: no layout does, or several do; all are named.
    """
    persistent = {name: spec for name, spec in contract.state.items() if spec.persistent}
    firsts = {name: spec for name, spec in persistent.items() if spec.tied in (None, name)}
    given = _find_specs(offer.contract)
    specs = {name: given[name] for name in _find_untied(offer)}
    config = None if offer.config is None else dict(offer.config)
    wanted = [_find_specs(replace(contract, state=state)) for state in (firsts, persistent)]
    try:  # a file has a tied tensor once, a state dict has it under every name
        return migrations.find_version(specs, config, code, wanted[0])
    except UnknownVersionError:
        if wanted[0] == wanted[1]:
            raise
        return migrations.find_version(specs, config, code, wanted[1])


def find_gap(gap: NoPathError, offer: Offer, migrations: Migrations, *, version: Version, code: Version) -> NoPathError:
    """Return `gap`, naming the silent steps that lie between the weights and the code, if any do."""
    low, high = sorted((version, code))
    between = [step for step in migrations.history() if low < step.target <= high]
    silent = [_describe_silent(step) for step in _find_silent(offer, between, name=migrations.name)]
    return NoPathError(gap.message, problems=[*gap.problems, *silent], remedy=gap.remedy) if silent else gap


def hides_values(gap: NoPathError | None) -> bool:
    """Tell whether tensors that fit may still be those of another layout, because of a silent step in the gap."""
    return gap is not None and any(problem.code == _SILENT for problem in gap.problems)


def verify_told(offer: Offer, migrations: Migrations, *, code: Version) -> None:
    """Refuse files without a version that fit the code, if by a known silent step they may be of another layout.

    Raises:
        UnknownVersionError: naming the steps.
    """
    if offer.files is None:
        return
    silent = _find_silent(offer, migrations.history(), name=migrations.name)
    silent = [step for step in silent if step.target > code or _fits_config(offer, step, name=migrations.name)]
    if silent:
        raise UnknownVersionError(
            f"Expected files that tell which version of {migrations.name!r} they are, got some that fit {code} as well "
            "as what came before or after a step that only changes values.",
            problems=[_describe_silent(step) for step in silent],
            remedy="say which version it is: pass version=..., or write it into the file (hotglm.save_weights).",
        )


def _find_silent(offer: Offer, steps: Sequence[Step], *, name: str) -> list[Step]:
    """Return the steps that make something else of the tensors of `offer`, of the same names, dtypes and shapes."""
    specs, silent = _find_specs(offer.contract), []
    for step in steps:
        if not step.state:
            continue
        with contextlib.suppress(MigrationStepError):
            plan = _take_up(step, name=name).plan_state(specs)
            if dict(plan.specs) == specs and not plan.is_identity:
                silent.append(step)
    return silent


def _fits_config(offer: Offer, step: Step, *, name: str) -> bool:
    try:
        if offer.config is not None:
            _take_up(step, name=name).migrate_config(dict(offer.config))
    except MigrationStepError:
        return False
    return True


def _take_up(step: Step, *, name: str) -> MigrationPath:
    return MigrationPath(name=name, source=step.source.low, target=step.target, hops=(Hop(step=step, is_up=True),))


def _describe_silent(step: Step) -> Problem:
    return Problem(
        code=_SILENT,
        message=f"Expected names and shapes to tell whether {step} is still to be done, got a step that keeps both.",
    )


def migrate_config(
    config: Mapping[str, Any] | None, migrations: Migrations, *, version: Version, code: Version
) -> Mapping[str, Any] | None:
    """Return the config of one version for code of another; as it is where no way leads there."""
    try:
        return None if config is None else migrations.plan(version, code).migrate_config(dict(config))
    except MigrationError:
        return config


def describe_gap(gap: NoPathError) -> Finding:
    """Return what a verdict says of versions that no migration connects."""
    remedy = gap.remedy.rstrip(".") or "add the migration that is missing"
    message = " ".join([gap.message, *(problem.message for problem in gap.problems)])
    return Finding(code=NoPathError.code, message=message, refuses=True, remedy=remedy)


def _with_plan(offer: Offer, plan: StatePlan, *, config: Mapping[str, Any] | None, lines: tuple[str, ...]) -> Offer:
    tensors = {name: (output.spec.dtype, output.spec.shape) for name, output in plan.outputs.items()}
    migration = Migration(plan=plan, lines=lines)
    return replace(offer, contract=Contract.of_tensors(tensors), config=config, migration=migration)


def _find_specs(contract: Contract) -> dict[str, TensorSpec]:
    return {name: TensorSpec(dtype=spec.dtype, shape=spec.shape) for name, spec in contract.state.items()}


def _find_outputs(offer: Offer) -> Mapping[str, Expression]:
    if offer.migration is not None:
        return offer.migration.plan.outputs
    return {name: Source(name, spec) for name, spec in _find_specs(offer.contract).items()}


def _describe(path: MigrationPath, version: Version, *, is_stamped: bool) -> tuple[str, ...]:
    stamped = (f"version {version} concluded from names, shapes and config, because the source carries none",)
    lines = path.explain().splitlines()
    more = (f"and {len(lines) - _NUM_LINES} lines more",) if len(lines) > _NUM_LINES else ()
    return (*(stamped if is_stamped else ()), *lines[:_NUM_LINES], *more)
