"""The versions of one model, as a matrix needs them: code, weights, arguments.

Rules this module keeps: a family is made of functions of the user's, called once for each cell; nothing is cached, so
that no cell can spoil another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from hotglm.errors import ArgumentError
from hotglm.migration.registry import Migrations
from hotglm.model.registry import find_definition, find_definitions, find_migrations
from hotglm.model.save import save_weights, untied_state
from hotglm.slot.checks import Inputs, StagePolicy
from hotglm.slot.slot import ModuleSlot
from hotglm.slot.source import Source
from hotglm.testing.goldens import GoldenRelease, find_goldens, read_golden
from hotglm.testing.round_trip import migrate_state
from hotglm.testing.traffic import EXACT, Tolerance
from hotglm.version import Version

__all__ = ["ModelFamily"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFamily:
    """The versions of one model.

    Attributes:
        make_model: takes a version, and returns a model of that version's code with that version's weights, started
            cold. Called anew for each cell.
        make_inputs: takes the running version, and returns the arguments of a pass.
        make_release: takes a version and an empty directory, and returns what is offered to the slot: a path, a mapping
            of tensors. By default a file of the model's weights, with its version, name and config.
        make_cold: takes the running version and the incoming one, and returns a model of the running version's code
            with the incoming weights, started cold without hotglm: what a swap by way of a migration is compared with.
            By default the weights are migrated in memory, and loaded by `load_state_dict`.
        options: further options of `ModuleSlot`: `migrations`, `refresh` and so on. By default every step is accepted
            (`accept="major"`), for a matrix asks what works, and dtypes are converted.
        tolerance: how far answers may be from a cold load's; not at all by default. Compiled cells get 1e-4 at least.
    """

    make_model: Callable[[str], nn.Module]
    make_inputs: Callable[[str], Inputs]
    make_release: Callable[[str, Path], Source] | None = None
    make_cold: Callable[[str, str], nn.Module] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    tolerance: Tolerance = EXACT

    def make_slot(self, module: nn.Module, *, name: str, version: str) -> ModuleSlot:
        """Return a slot that runs `module` as `version`."""
        options = {"accept": "major", "policy": StagePolicy(convert_dtypes=True), **self.options}
        return ModuleSlot(module, name=name, version=version, **options)

    def write_release(self, version: str, directory: Path, *, name: str) -> Source:
        """Return what is offered to a slot as `version`."""
        if self.make_release is not None:
            return self.make_release(version, directory)
        path = directory / f"{name}-{version}.safetensors"
        save_weights(self.make_model(version), path, version=version, name=name)
        return path

    def find_path(self, module: nn.Module, *, incoming: str, code_version: str) -> tuple[str, ...]:
        """Return the versions that incoming weights go through to the code of `module`; empty if they need not."""
        migrations = self._find_migrations(module)
        hops = migrations.plan(incoming, code_version).hops if migrations is not None else ()
        return (incoming, *(str(hop.arrives) for hop in hops)) if hops else ()

    def start_cold(self, running: str, incoming: str, *, code_version: str) -> nn.Module:
        """Return a model of the code of `code_version` with the incoming weights, started without a slot."""
        if code_version == running != incoming and self.make_cold is not None:
            return self.make_cold(running, incoming)
        cold = self.make_model(code_version)
        if code_version != incoming:
            self._fill(cold, incoming, code_version=code_version)
        return cold

    def _fill(self, cold: nn.Module, incoming: str, *, code_version: str) -> None:
        """Load the incoming weights as plain torch does, having migrated them as a file has them: ties once."""
        state = dict(untied_state(self.make_model(incoming)))
        if (migrations := self._find_migrations(cold)) is not None:
            state = migrate_state(migrations, state, source=incoming, target=code_version)
        missing, unexpected = cold.load_state_dict(state, strict=False)
        firsts = dict(untied_state(cold))
        if wrong := [*unexpected, *(name for name in missing if name in firsts)]:
            raise ArgumentError(
                f"Expected weights of {incoming} that fill code of {code_version}, got others: {', '.join(wrong)}.",
                remedy="correct make_model or the migration, or give the family a make_cold.",
            )

    def _find_migrations(self, module: nn.Module) -> Migrations | None:
        given, definition = self.options.get("migrations"), find_definition(type(module))
        if given is None and definition is not None:
            given = find_migrations(definition.name)
        return given if isinstance(given, Migrations) and given.history() else None

    @classmethod
    def of_goldens(cls, name: str, directory: Path, **settings: Any) -> ModelFamily:
        """Return the family of a registered model whose released versions are kept as goldens.

        Code is that of the classes registered for each version, weights and arguments are those of the goldens.

        Args:
            name: name of the model.
            directory: where all goldens are kept.
            settings: further attributes of the family.
        """
        paths = {path.name: path for path in find_goldens(directory) if path.parent.name == name}

        def find(version: str) -> GoldenRelease:
            path = paths.get(str(Version(version)))
            if path is None:
                raise ArgumentError(
                    f"Expected a golden of {name!r} {version} in {str(directory)!a}, got {', '.join(paths) or 'none'}.",
                    remedy="make it (python -m hotglm golden make), or override the fixture hotglm_model.",
                )
            return read_golden(path)

        def make_model(version: str) -> nn.Module:
            definition = next((d for d in find_definitions(name) if d.version == Version(version)), None)
            if definition is None:
                raise ArgumentError(
                    f"Expected a class registered as {name!r} {version}, got none.",
                    remedy="import the module that declares it, or override the fixture hotglm_model.",
                )
            golden = find(version)
            slot = ModuleSlot(definition.build(golden.config), name=name, version=version, accept="major")
            slot.update(golden.weights)
            return slot.live.module

        return cls(
            make_model=make_model,
            make_inputs=lambda version: find(version).inputs,
            make_release=lambda version, _: find(version).weights,
            **settings,
        )
