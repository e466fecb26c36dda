"""What a migration does, known before anything is read: the path, and what each new tensor is made of.

Rules this module keeps:

- Pure: configs, specs and expressions in and out. What is passed in is never changed.
- A step that fails is named, with its operation and every tensor concerned; nothing of its work is left over.
- A way down that was derived is not believed: on the real names, going up again must lead to where one came from.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hotglm.errors import ArgumentError, MigrationStepError, Problem, shorten_repr
from hotglm.migration.config import ConfigChange, FieldChange, UnfitConfigError
from hotglm.migration.expression import (
    Expression,
    Narrow,
    Permuted,
    Select,
    Source,
    TensorSpec,
    find_nodes,
    find_sources,
)
from hotglm.migration.operation import Operation, Report, State
from hotglm.migration.origin import describe_function
from hotglm.migration.step import Hop
from hotglm.problem import describe_exception
from hotglm.version import Version

__all__ = ["MigrationPath", "StatePlan", "Unit", "plan_state"]

_VIEWS = (Narrow, Permuted, Select)
_NUM_TENSORS_SHOWN = 30
_DEPTH_SHOWN = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Tensors that are evaluated together, because they have sources in common.

    Attributes:
        sources: names of the old tensors that it reads.
        outputs: names of the new tensors that it makes.
        is_copy: whether every new tensor is an old one as it is.
        nbytes: what evaluating it takes beside its outputs: its sources, and what lies between these and the outputs.
            None of it for copies, which are read to where they stay.
    """

    sources: tuple[str, ...]
    outputs: tuple[str, ...]
    is_copy: bool
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StatePlan:
    """What every tensor of the new state is made of.

    Attributes:
        sources: dtype and shape of every old tensor.
        outputs: an expression over the old tensors for every new one.
        path: the hops that it follows, for texts.
    """

    sources: Mapping[str, TensorSpec]
    outputs: Mapping[str, Expression]
    path: str = ""
    units: tuple[Unit, ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        """Group the outputs into units."""
        object.__setattr__(self, "units", tuple(_find_units(self.outputs)))

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape of every new tensor."""
        return {name: expression.spec for name, expression in self.outputs.items()}

    @property
    def dropped(self) -> tuple[str, ...]:
        """Names of the old tensors that nothing new is made of, in their order."""
        used = {name for unit in self.units for name in unit.sources}
        return tuple(name for name in self.sources if name not in used)

    @property
    def is_identity(self) -> bool:
        """Whether the new state is the old one, name by name."""
        return self.outputs.keys() == self.sources.keys() and all(
            isinstance(expression, Source) and expression.name == name for name, expression in self.outputs.items()
        )

    def peak_nbytes(self, *, num_workers: int = 1) -> int:
        """Return the most memory that evaluation takes beside the outputs, with `num_workers` units at a time.

        It is the sum of the `num_workers` largest `Unit.nbytes`: a unit that copies takes none, any other its sources,
        and each inner expression that is no view of its operand (only the outputs themselves lie where they stay).
        """
        return sum(sorted((unit.nbytes for unit in self.units), reverse=True)[:num_workers])

    def explain(self) -> str:
        """Return what it does, in words: the path, and every tensor that is not read as it is."""
        changed = [
            f"  {shorten_repr(name)} = {format_expression(expression)}"
            for name, expression in self.outputs.items()
            if not (isinstance(expression, Source) and expression.name == name)
        ]
        more = len(changed) - _NUM_TENSORS_SHOWN
        dropped = self.dropped
        lines = [
            (
                f"State {self.path}: {len(self.outputs)} tensors, {len(changed)} changed, {len(dropped)} dropped; "
                f"{self.peak_nbytes()} bytes beside them."
            ),
            *changed[:_NUM_TENSORS_SHOWN],
            *([f"  and {more} more"] if more > 0 else []),
            *([f"  dropped: {', '.join(map(shorten_repr, dropped[:_NUM_TENSORS_SHOWN]))}"] if dropped else []),
        ]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationPath:
    """The way from one version to another.

    Attributes:
        name: of the model.
        source: the version that it leads from.
        target: the version that it leads to.
        hops: the steps, in order; none where both versions have the same layout.
    """

    name: str
    source: Version
    target: Version
    hops: tuple[Hop, ...]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not self.hops

    def migrate_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config of the target version; `config` stays as it is, down to its innermost list.

        Raises:
            ArgumentError: it is not a mapping.
            MigrationStepError: a step does not fit it, raised, or returned no dict.
        """
        if not isinstance(config, Mapping):
            raise ArgumentError(
                f"Expected the fields of a config, got {shorten_repr(config)}.", remedy="give a plain dict."
            )
        current: dict[str, Any] = copy.deepcopy(dict(config))
        for hop in self.hops:
            for change in hop.changes:
                current = self._change(current, change, hop)
        return current

    def _change(self, config: dict[str, Any], change: ConfigChange, hop: Hop) -> dict[str, Any]:
        label = str(change) if isinstance(change, FieldChange) else describe_function(change)
        remedy = "correct the step, or the version that the config carries."
        try:
            # Copied again afterwards: a function may keep what it was given, or return something that it keeps.
            changed = copy.deepcopy(change.apply(config) if isinstance(change, FieldChange) else change(config))
        except UnfitConfigError as error:
            problem = Problem(code="CONFIG_UNFIT", message=str(error))
            raise self._fail(hop, label, "a config that it does not fit", [problem], remedy) from None
        except Exception as error:
            problem = Problem(code="STEP_RAISED", message=f"Expected a config, got {describe_exception(error)}.")
            raise self._fail(hop, label, "an error", [problem], remedy) from error
        if not isinstance(changed, dict):
            problem = Problem(code="NO_DICT", message=f"Expected a dict, got {shorten_repr(changed)}.")
            raise self._fail(hop, label, "no config", [problem], "end the function with `return config`.")
        return changed

    def plan_state(self, specs: Mapping[str, TensorSpec]) -> StatePlan:
        """Return what every tensor of the target version is made of; nothing is read.

        Args:
            specs: dtype and shape of every tensor of the source version, by name.

        Raises:
            MigrationStepError: an operation does not fit; the problems name every tensor concerned.
        """
        state: State = {name: Source(name, spec) for name, spec in specs.items()}
        for hop in self.hops:
            before = {name: Source(name, tensor.spec) for name, tensor in state.items()} if hop.is_derived else {}
            self._run(hop, hop.operations, state)
            if hop.is_derived:
                self._verify_way_back(hop, before)
        return StatePlan(sources=dict(specs), outputs=state, path=self._format_path())

    def _run(self, hop: Hop, operations: Sequence[Operation], state: State) -> None:
        for operation in operations:
            report = Report(step=str(hop))
            operation.rewrite(state, report)
            if report.problems:
                raise self._fail(
                    hop,
                    str(operation),
                    "tensors that it does not fit",
                    report.problems,
                    "correct the operation, or the version that the tensors carry.",
                )

    def _verify_way_back(self, hop: Hop, before: Mapping[str, Source]) -> None:
        """Refuse a derived way down from which the way up does not lead every tensor back to its name and spec."""
        again: State = dict(before)
        self._run(hop, hop.operations, again)
        kept = {*find_sources(*again.values())}
        self._run(hop, hop.step.state or (), again)
        problems = [
            Problem(
                code="NOT_INVERTED",
                message=f"Expected {shorten_repr(name)} ({_show(before.get(name))}) to come back on the way up, got "
                f"{_show(again.get(name))}.",
                tensor=name,
            )
            for name in {**before, **again}
            if _show(before.get(name)) != _show(again.get(name))
        ]
        problems += [
            Problem(
                code="NOT_INVERTED",
                message=f"Expected {shorten_repr(name)} on the way up, got {format_expression(again[name])}.",
                tensor=name,
            )
            for name in before
            if name in kept and name in again and not _is_of(again[name], name)
        ]
        if problems:
            raise self._fail(
                hop,
                "; ".join(map(str, hop.operations)),
                "a way down that does not lead back",
                problems,
                "give the step the operations of its way down (`down`).",
            )

    def _fail(self, hop: Hop, operation: str, got: str, problems: Iterable[Problem], remedy: str) -> MigrationStepError:
        error = MigrationStepError(
            f"Expected {operation} in the step {hop} of {self.name!r} to do its work, got {got}; nothing was changed.",
            problems=problems,
            remedy=remedy,
        )
        error.step, error.operation = str(hop), operation
        return error

    def _format_path(self) -> str:
        return " -> ".join(map(str, (self.source, *(hop.arrives for hop in self.hops))))

    def explain(self) -> str:
        """Return the hops in words, with the changes and operations of each."""
        if self.is_empty:
            return f"{self.name!r} {self.source} -> {self.target}: the same layout, nothing to do."
        lines = [f"{self.name!r} {self.source} -> {self.target}: {len(self.hops)} step{'s' * (len(self.hops) != 1)}."]
        for hop in self.hops:
            lines.append(f"  {hop} ({'up' if hop.is_up else 'down'})")
            lines += [
                f"    config: {change if isinstance(change, FieldChange) else describe_function(change)}"
                for change in hop.changes
            ]
            lines += [f"    state: {operation}" for operation in hop.operations]
        return "\n".join(lines)


def plan_state(path: MigrationPath, specs: Mapping[str, TensorSpec]) -> StatePlan:
    """Return what every tensor of the target version is made of, as `path.plan_state` does."""
    return path.plan_state(specs)


def format_expression(expression: Expression, *, depth: int = _DEPTH_SHOWN) -> str:
    """Return an expression on one line, its tensors by name; what lies below `depth` nodes is left out."""
    if isinstance(expression, Source):
        return shorten_repr(expression.name)
    shown = [format_expression(operand, depth=depth - 1) if depth > 1 else "..." for operand in expression.operands]
    operands = ", ".join(shown)
    fields = [
        f"{name}={shorten_repr(value)}"
        for name in getattr(expression, "__match_args__", ())
        if name not in ("operand", "operands", "spec", "function", "writes", "reads", "step")
        for value in (getattr(expression, name),)
    ]
    inside = ", ".join([*([operands] if operands else []), *fields])
    return f"{type(expression).__name__}({inside}) [{expression.spec}]"


def _is_of(tensor: Expression, name: str) -> bool:
    """Tell whether `tensor` is the source `name`, or is computed from it and maybe others."""
    return name in find_sources(tensor)


def _show(tensor: Expression | None) -> str:
    return "nothing" if tensor is None else str(tensor.spec)


def _find_units(outputs: Mapping[str, Expression]) -> Iterator[Unit]:
    """Group the outputs that share sources; units come in the order of their first output."""
    owner: dict[str, int] = {}
    members: dict[int, list[str]] = {}
    sources: dict[int, dict[str, None]] = {}
    for number, (name, expression) in enumerate(outputs.items()):
        needed = find_sources(expression)
        joined = sorted({owner[source] for source in needed if source in owner})
        unit = joined[0] if joined else number
        for other in joined[1:]:
            members[unit] += members.pop(other)
            absorbed = sources.pop(other)
            sources[unit].update(absorbed)
            owner.update(dict.fromkeys(absorbed, unit))
        members.setdefault(unit, []).append(name)
        sources.setdefault(unit, {}).update(dict.fromkeys(needed))
        owner.update(dict.fromkeys(needed, unit))
    for unit, names in sorted(members.items()):
        made = [outputs[name] for name in names]
        is_copy = all(isinstance(expression, Source) for expression in made)
        yield Unit(
            sources=tuple(sources[unit]),
            outputs=tuple(names),
            is_copy=is_copy,
            nbytes=0 if is_copy else _sum_nbytes(made),
        )


def _sum_nbytes(outputs: Sequence[Expression]) -> int:
    made = set(outputs)
    return sum(
        node.spec.nbytes
        for node in find_nodes(outputs)
        if isinstance(node, Source) or not (isinstance(node, _VIEWS) or node in made)
    )
