"""The migrations of one model: steps registered by version, and what can be asked of them.

Rules this module keeps:

- A registry holds functions and data, never a model class, and imports nothing: old versions can be migrated in a
  process that cannot construct them.
- One step per range and target. The same definition given again (a notebook cell run twice, a module reloaded) replaces
  itself; another one is refused.
- Any thread may register and ask; whoever asks sees whole steps.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, overload

from hotglm.errors import ArgumentError, MigrationError, MigrationGraphError, Problem, UnknownVersionError, shorten_repr
from hotglm.migration.config import ConfigChange, ConfigFunction, as_changes
from hotglm.migration.graph import Graph
from hotglm.migration.operation import Operation
from hotglm.migration.origin import origin_of
from hotglm.migration.plan import MigrationPath
from hotglm.migration.step import Hop, Step, make_source
from hotglm.migration.tensor_spec import TensorSpec
from hotglm.version import Version, VersionRange

__all__ = ["Migrations"]

_Function = TypeVar("_Function", bound=ConfigFunction)
_Source = str | Version | VersionRange
_Changes = ConfigChange | Sequence[ConfigChange]


class Migrations:
    """The migrations of the model `name`.

    >>> migrations = Migrations("ranker")
    >>> @migrations.config("1.4", "2.0")
    ... def _(config):
    ...     config["max_length"] = config.pop("max_seq_len")
    ...     return config
    >>> migrations.plan("1.4.2", "2.3.0").migrate_config({"max_seq_len": 8})
    {'max_length': 8}
    """

    def __init__(self, name: str) -> None:
        """Begin without steps.

        Raises:
            ArgumentError: `name` is not a non-empty text.
        """
        if not isinstance(name, str) or not name:
            raise ArgumentError(f"Expected a model name, got {shorten_repr(name)}.", remedy="give a non-empty string.")
        self.name = name
        self._lock = threading.Lock()
        self._steps: dict[tuple[object, Version], Step] = {}
        self._graph: Graph | None = None

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the steps; their functions must be ones that pickle can find again, at the top of a module."""
        with self._lock:
            return (_rebuild, (self.name, dict(self._steps)))

    # -- registering ---------------------------------------------------------------------------------------------------

    @overload
    def config(
        self, source: _Source, target: str | Version, changes: None = None, *, down: _Changes | None = None
    ) -> Callable[[_Function], _Function]: ...

    @overload
    def config(
        self, source: _Source, target: str | Version, changes: _Changes, *, down: _Changes | None = None
    ) -> None: ...

    def config(
        self,
        source: _Source,
        target: str | Version,
        changes: _Changes | None = None,
        *,
        down: _Changes | None = None,
    ) -> Callable[[_Function], _Function] | None:
        """Register how the config gets from `source` to `target`; without `changes`, decorate the function that does.

        Args:
            source: a version (all from it up to the target) or a range below the target.
            target: the version whose layout the step leads to.
            changes: declared changes or functions from dict to dict, in order.
            down: what leads back; None derives it where every change is invertible.

        Raises:
            VersionSyntaxError: a version or range does not parse.
            ArgumentError: a change is neither declared nor a function.
            MigrationGraphError: the step does not lead upwards, or the config has another definition for it already.
        """
        if changes is None:

            def register(function: _Function) -> _Function:
                self.config(source, target, function, down=down)
                return function

            return register
        self._add(
            source,
            Version(target),
            {"config": as_changes(changes), "config_down": None if down is None else as_changes(down)},
        )
        return None

    def state(
        self,
        source: _Source,
        target: str | Version,
        operations: Sequence[Operation],
        *,
        down: Sequence[Operation] | None = None,
    ) -> None:
        """Register how the state gets from `source` to `target`.

        Args:
            source: a version (all from it up to the target) or a range below the target.
            target: the version whose layout the step leads to.
            operations: in order.
            down: the operations that lead back, in order; None derives them where every operation is invertible.

        Raises:
            VersionSyntaxError: a version or range does not parse.
            ArgumentError: something in it is not an operation.
            MigrationGraphError: the step does not lead upwards, or the state has another definition for it already.
        """
        given = _as_operations(operations)
        self._add(
            source, Version(target), {"state": given, "state_down": None if down is None else _as_operations(down)}
        )

    def _add(self, source: _Source, target: Version, parts: Mapping[str, Any]) -> None:
        made = make_source(source, target)
        key = (made.key, target)
        with self._lock:
            known = self._steps.get(key) or Step(source=made, target=target)
            for part, definition in parts.items():
                there = getattr(known, part)
                if there is not None and origin_of(there) != origin_of(definition):
                    raise MigrationGraphError(
                        f"Expected one definition of the {part.partition('_')[0]} in the step {known} of "
                        f"{self.name!r}, got {shorten_repr(definition)} beside {shorten_repr(there)}.",
                        remedy="put both into one definition, or give the new one its own version.",
                        code="DUPLICATE_STEP",
                    )
            self._steps[key] = replace(known, **parts)
            self._graph = None

    # -- asking --------------------------------------------------------------------------------------------------------

    @property
    def graph(self) -> Graph:
        """The steps as they are now; immutable."""
        with self._lock:
            if self._graph is None:
                self._graph = Graph(self._steps.values())
            return self._graph

    def plan(self, source: str | Version, target: str | Version) -> MigrationPath:
        """Return the shortest path from `source` to `target`, up or down; an empty one where the layout is the same.

        Raises:
            VersionSyntaxError: a version does not parse.
            NoPathError: there is none; the problems name the nearest versions on both sides.
            AmbiguousPathError: there are several shortest paths; the problems name two.
        """
        start, end = Version(source), Version(target)
        return MigrationPath(name=self.name, source=start, target=end, hops=self.graph.find_path(start, end))

    def history(self) -> tuple[Step, ...]:
        """Return the steps, oldest target first."""
        return self.graph.steps

    def heads(self) -> tuple[Version, ...]:
        """Return the layouts that no step leads up from, lowest first; `check` reports more than one."""
        return self.graph.find_heads()

    def current(self, version: str | Version) -> Version | None:
        """Return the version that began the layout of `version`; None where no step is known to lead to or from it."""
        return self.graph.find_current(Version(version))

    def check(self) -> tuple[Problem, ...]:
        """Return what is wrong with the steps as a whole, without a config or tensor: codes and their meaning.

        `TWO_HEADS`: no step leads up from a layout that is not the newest. `GAP`: versions between the sources of two
        steps belong to neither. `UNREACHABLE`: no version arrives where a step begins. `AMBIGUOUS_PATH`: two shortest
        paths to the newest layout. `NO_WAY_DOWN`: a step cannot be gone down, and why.
        """
        return tuple(self.graph.find_problems())

    def verify(self) -> None:
        """Raise if `check` finds anything but steps that cannot be gone down.

        Raises:
            MigrationGraphError: with all the problems.
        """
        problems = [problem for problem in self.check() if problem.code != "NO_WAY_DOWN"]
        if problems:
            raise MigrationGraphError(
                f"Expected the migrations of {self.name!r} to lead from every version to one head, got "
                f"{len(problems)} problems.",
                problems=problems,
                remedy="register the missing steps, or make the sources of overlapping ones disjoint.",
            )

    def explain(self) -> str:
        """Return the steps in words, oldest first, with the heads."""
        lines = [f"{self.name!r}: {len(self.history())} steps, heads: {', '.join(map(str, self.heads())) or 'none'}."]
        for step in self.history():
            parts = [part for part in ("config", "state") if getattr(step, part) is not None]
            lines.append(f"  {step}: {' and '.join(parts)}{', up only' if step.one_way else ''}")
        return "\n".join(lines)

    def find_version(
        self,
        specs: Mapping[str, TensorSpec],
        config: Mapping[str, Any] | None,
        target_version: str | Version,
        target_specs: Mapping[str, TensorSpec],
    ) -> Version:
        """Return the only known layout from which these tensors and this config lead exactly to the target.

        Every known layout is tried in a dry run; nothing is read. Where no layout leads to the very dtypes of the
        target, those that lead to its names and shapes count. Of several, those count whose config could also have come
        from the layout below.

        Args:
            specs: dtype and shape of the tensors at hand, by name.
            config: the config at hand; None where there is none, which then excludes no layout.
            target_version: the version that reads them.
            target_specs: dtype and shape of the tensors that it reads, by name.

        Raises:
            UnknownVersionError: no layout leads there, or several do; the problems name each.
        """
        target = Version(target_version)
        exact: list[Version] = []
        shaped: list[Version] = []
        problems: list[Problem] = []
        for version in self.graph.find_layouts(target):
            try:
                path = self.plan(version, target)
                if config is not None:
                    path.migrate_config(config)
                found = path.plan_state(specs).specs
            except MigrationError as error:
                why = error.problems[0].message if error.problems else error.message
            else:
                why = _describe_difference(found, target_specs)
                if not why:
                    (exact if dict(found) == dict(target_specs) else shaped).append(version)
            if why:
                problems.append(Problem(code="LAYOUT_UNFIT", message=f"Not {version}: {why}"))
        fitting = exact or shaped
        if len(fitting) > 1 and config is not None:
            fitting = [version for version in fitting if self._may_have(version, config)] or fitting
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            problems = [Problem(code="LAYOUT_FITS", message=f"{version} fits.") for version in fitting]
        raise UnknownVersionError(
            f"Expected tensors that fit one known version of {self.name!r} and lead to {target}, got some that fit "
            f"{' and '.join(map(str, fitting)) or 'none'}.",
            problems=problems,
            remedy="say which version it is (in the metadata of the file, or to whoever reads it).",
        )

    def _may_have(self, version: Version, config: Mapping[str, Any]) -> bool:
        """Tell whether `config` fits a way down from `version`, where one is known."""
        hops = [Hop(step=step, is_up=False) for step in self.history() if step.target == version and not step.one_way]
        for hop in hops:
            try:
                MigrationPath(name=self.name, source=version, target=hop.arrives, hops=(hop,)).migrate_config(config)
            except MigrationError:
                continue
            return True
        return not hops


def _rebuild(name: str, steps: dict[tuple[object, Version], Step]) -> Migrations:
    migrations = Migrations(name)
    migrations._steps = steps
    return migrations


def _as_operations(operations: object) -> tuple[Operation, ...]:
    given = tuple(operations) if isinstance(operations, Sequence) and not isinstance(operations, str) else (operations,)
    for operation in given:
        if not isinstance(operation, Operation):
            raise ArgumentError(
                f"Expected operations on a state, got {shorten_repr(operation)}.",
                remedy="give Rename, Split, Concatenate and so on; Apply takes a free function.",
            )
    return given


def _describe_difference(found: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec]) -> str:
    """Return the first difference of names or shapes; empty where there is none."""
    for name in {**wanted, **found}:
        there, want = found.get(name), wanted.get(name)
        if there is None or want is None or there.shape != want.shape:
            return f"it leads to {there or 'nothing'} at {shorten_repr(name)}, where {want or 'nothing'} is read."
    return ""
