"""Goldens verified: today's code still loads what was released, and answers as it did.

Rules this module keeps:

- What is asked of a golden is what a service would do: today's code holds a slot, and the old weights are staged into
  it, by way of their migrations.
- The answer must be equal bit for bit where nothing lies between: the same torch on the same kind of processor, and
  the version's own code. Else it must be within the tolerance that the golden was made with, because another order of
  additions is no breakage.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from hotglm.errors import DefinitionError, GoldenMismatchError, HotglmError, Problem
from hotglm.model.recording import call_with
from hotglm.model.registry import find_definition, find_definitions, find_migrations
from hotglm.problem import describe_exception, escape_text
from hotglm.slot.slot import ModuleSlot
from hotglm.testing.assertions import find_codes
from hotglm.testing.golden_tree import plain
from hotglm.testing.goldens import GoldenRelease, describe_machine, find_goldens, read_golden
from hotglm.testing.traffic import EXACT, describe_differences
from hotglm.version import Version

__all__ = ["GoldenOutcome", "GoldenProof", "assert_goldens_load", "build_today", "find_outcomes", "verify_golden"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenProof:
    """What `verify_golden` has proved.

    Attributes:
        name: name of the model.
        version: the version.
        code_version: version of the code that held it.
        is_exact: whether the answer was asked for bit for bit.
    """

    name: str
    version: Version
    code_version: Version
    is_exact: bool

    def __str__(self) -> str:
        """Say it in a line."""
        how = "bit for bit" if self.is_exact else "within its tolerance"
        name = escape_text(self.name)
        return f"{name} {self.version}: loads under the code of {self.code_version}, answers as recorded {how}"


def verify_golden(golden: GoldenRelease, *, model: nn.Module | None = None) -> GoldenProof:
    """Return what was proved of a golden: that it loads under today's code and answers as it did.

    Args:
        golden: from `read_golden`.
        model: today's model, which the golden is staged into; the newest registered class of that name if None, built
            from the golden's config. The modules that register the classes must have been imported.

    Raises:
        HotglmError: it cannot be staged, or built. GoldenMismatchError: it answers something else; all is named.
    """
    code = build_today(golden) if model is None else model
    definition = find_definition(type(code))
    own = golden.version if definition is None else definition.version
    slot = ModuleSlot(code.eval(), name=golden.name, version=own, accept="major")
    slot.update(golden.weights)
    with torch.no_grad(), slot.acquire() as generation:
        holding = find_definition(type(generation.module))  # that of the golden's own version, where it is still there
        code_version = own if holding is None else holding.version
        is_exact = _is_exact(golden, code_version=code_version)
        try:
            found = plain(call_with(generation.module, golden.inputs))
        except Exception as error:
            raise _mismatch(golden, [f"the arguments that were recorded raise {describe_exception(error)}"]) from error
    if wrong := describe_differences(golden.outputs, found, tolerance=EXACT if is_exact else golden.tolerance):
        raise _mismatch(golden, wrong)
    return GoldenProof(name=golden.name, version=golden.version, code_version=code_version, is_exact=is_exact)


def build_today(golden: GoldenRelease) -> nn.Module:
    """Return a model of the newest registered class of a golden's name, built from the golden's config.

    Raises:
        DefinitionError: no class is registered under that name, or it cannot be built.
        MigrationError: the config cannot be brought to the class's version.
    """
    definition = next(iter(find_definitions(golden.name)), None)
    if definition is None:
        raise DefinitionError(
            f"Expected a class registered as {golden.name!r}, got none.",
            remedy="import the module that declares it (@hotglm.versioned), or pass the model.",
        )
    migrations = find_migrations(golden.name)
    if golden.config is None or definition.config is None or not migrations.history():
        return definition.build(golden.config)
    return definition.build(migrations.plan(golden.version, definition.version).migrate_config(golden.config))


def _is_exact(golden: GoldenRelease, *, code_version: Version) -> bool:
    return code_version == golden.version and all(
        golden.made_on.get(key) == value for key, value in describe_machine().items() if key != "python"
    )


def _mismatch(golden: GoldenRelease, wrong: list[str]) -> GoldenMismatchError:
    return GoldenMismatchError(
        f"Expected {golden.name} {golden.version} to answer as it did when it was released.",
        problems=[Problem(code="GOLDEN_MISMATCH", message=text, file=str(golden.path)) for text in wrong],
        remedy="correct the code or the migration; if callers are to get other answers, that is a new version.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenOutcome:
    """What became of one golden.

    Attributes:
        label: its name and version.
        proof: what was proved, where it loads.
        error: why not, where it does not.
    """

    label: str
    proof: GoldenProof | None = None
    error: HotglmError | None = None


def find_outcomes(
    directory: str | os.PathLike[str], *, make_model: Callable[[GoldenRelease], nn.Module] | None = None
) -> Iterator[GoldenOutcome]:
    """Yield what becomes of every golden under `directory` when it is verified."""
    for path in find_goldens(directory):
        label = f"{path.parent.name} {path.name}"
        try:
            golden = read_golden(path)
            proof = verify_golden(golden, model=None if make_model is None else make_model(golden))
        except HotglmError as error:
            yield GoldenOutcome(label=label, error=error)
        else:
            yield GoldenOutcome(label=label, proof=proof)


def assert_goldens_load(
    directory: str | os.PathLike[str],
    *,
    make_model: Callable[[GoldenRelease], nn.Module] | None = None,
    expected: Mapping[str, str] | None = None,
) -> tuple[GoldenProof, ...]:
    """See that every golden under `directory` still loads under today's code and answers as it did (P7).

    Args:
        directory: where all goldens are kept.
        make_model: returns today's model for a golden; the newest registered class of its name if None.
        expected: goldens that are no longer taken, as `"name version"`, each with the code it is refused with.

    Raises:
        AssertionError: there is none, some do not load, or one that was given up loads again; all are named.
    """
    outcomes = list(find_outcomes(directory, make_model=make_model))
    declared = dict(expected or {})
    wrong: list[str] = []
    for outcome in outcomes:
        code = declared.pop(outcome.label, None)
        if outcome.error is None:
            wrong += [f"{outcome.label}: expected a refusal for {code}, got that it loads"] if code is not None else []
        elif code not in find_codes(outcome.error):
            wrong.append(f"{outcome.label}: {outcome.error}")
    wrong += [f"{label}: expected a golden, got none of that name" for label in declared]
    if not outcomes:
        wrong.append(f"expected goldens in {os.fspath(directory)!a}, got none (python -m hotglm golden make --help)")
    if wrong:
        raise AssertionError("Expected every golden to load as declared, got:" + "".join(f"\n  - {t}" for t in wrong))
    return tuple(outcome.proof for outcome in outcomes if outcome.proof is not None)
