"""Versions of model classes, by decorator, and the registry that finds them.

Rules this module keeps:

- The mark is on the class that was decorated, not on its subclasses: a subclass is another model until it says
  otherwise.
- One class per name and version. The same class defined again (a notebook cell run twice, a module reloaded) replaces
  itself; another class is refused.
- The registry holds classes, never instances, and imports nothing.
- All versions of a name share one `Migrations`. A class has it as `migrations`, unless it has its own attribute of that
  name, which is left alone; `migrations_of` finds it either way.
"""

from __future__ import annotations

import dataclasses
import inspect
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from hotglm.config_spec import ConfigSource, fill_config
from hotglm.errors import DefinitionError, shorten_repr
from hotglm.migration.registry import Migrations
from hotglm.problem import describe_exception
from hotglm.version import Version, VersionRange

__all__ = ["Definition", "find_definition", "find_definitions", "find_migrations", "migrations_of", "versioned"]

_MARK = "__hotglm_definition__"
_MIGRATIONS = "migrations"

ModelClass = TypeVar("ModelClass", bound=type[nn.Module])


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """What `versioned` declares of a model class.

    Attributes:
        name: the model's name, the same for all its versions.
        version: the version of this code.
        reads: the versions of weights that this code can hold.
        config: what makes the config that is passed to the class (see `ConfigSpec.of`), or None.
        requires: PEP 508 requirements on `python` and packages.
        capabilities: free words for what the model can do.
        model: the class.
    """

    name: str
    version: Version
    reads: VersionRange | None
    config: ConfigSource | None
    requires: tuple[str, ...]
    capabilities: frozenset[str]
    model: type[nn.Module]

    def make_config(self, config: object) -> object:
        """Return the config object for `config`: a mapping of its fields, or such an object already.

        Raises:
            DefinitionError: the fields do not fit.
        """
        if self.config is None or not isinstance(config, Mapping):
            return config
        try:
            return fill_config(self.config, config) if isinstance(self.config, Mapping) else self.config(**config)
        except Exception as error:
            raise self._unfit(error) from error

    def build(self, config: object = None) -> nn.Module:
        """Construct the model from `config`: a mapping of the config's fields, a config object, or None.

        Raises:
            DefinitionError: the class or its config cannot be constructed from that.
        """
        try:
            if self.config is None:
                return self.model()
            return self.model(self.make_config({} if config is None else config))
        except DefinitionError:
            raise
        except Exception as error:
            raise self._unfit(error) from error

    def _unfit(self, error: Exception) -> DefinitionError:
        return DefinitionError(
            f"Expected {self.model.__qualname__} {self.version} to be built from its config, got "
            f"{describe_exception(error)}.",
            remedy="ship the config beside the weights (config.json or metadata), or stage a module.",
        )


class _OnClass:
    """The attribute `migrations` of a class, which its instances do not have.

    On an instance it would hide a submodule, parameter or buffer of that name, which torch looks up only where nothing
    else is found; raising AttributeError here sends Python on to that look-up.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, instance: object, owner: type[object]) -> Migrations:
        if instance is not None:
            raise AttributeError(f"{owner.__qualname__!r} object has no attribute {_MIGRATIONS!r}")
        return find_migrations(self._name)


_lock = threading.Lock()
_definitions: dict[str, dict[Version, Definition]] = {}
_migrations: dict[str, Migrations] = {}


def versioned(
    name: str,
    version: str | Version,
    *,
    reads: str | VersionRange | None = None,
    config: ConfigSource | None = None,
    requires: Iterable[str] = (),
    capabilities: Iterable[str] = (),
) -> Callable[[ModelClass], ModelClass]:
    """Give a model class its name and version, and enter it in the registry.

    Several versions of one name may live side by side; a slot picks the class that fits the version being staged.

    Args:
        name: the model's name.
        version: the version of this code.
        reads: the versions of weights that this code can hold; None means those whose layout fits.
        config: a dataclass, pydantic model or `TypedDict`, or a mapping of names to types or pairs of type and default;
            the class is then constructed as `Model(config(**fields))`, for a mapping as `Model(fields)`, else as
            `Model()`.
        requires: requirements such as `"torch>=2.6"`, decided before anything is loaded.
        capabilities: what the model can do, in words of the user's own.

    Raises:
        DefinitionError: not a module class, an empty name, or another class has that name and version.
        VersionSyntaxError: `version` or `reads` does not parse.
    """
    if not isinstance(name, str) or not name:
        raise DefinitionError(f"Expected a model name, got {shorten_repr(name)}.", remedy="give a non-empty string.")
    parsed, range_ = Version(version), None if reads is None else VersionRange(reads)

    def mark(model: ModelClass) -> ModelClass:
        if not (inspect.isclass(model) and issubclass(model, nn.Module)):
            raise DefinitionError(
                f"Expected @versioned on an nn.Module class, got {shorten_repr(model)}.", remedy="decorate the class."
            )
        definition = Definition(
            name=name,
            version=parsed,
            reads=range_,
            config=config,
            requires=tuple(requires),
            capabilities=frozenset(capabilities),
            model=model,
        )
        _register(definition)
        setattr(model, _MARK, definition)
        if isinstance(inspect.getattr_static(model, _MIGRATIONS, _OnClass(name)), _OnClass):
            setattr(model, _MIGRATIONS, _OnClass(name))
        return model

    return mark


def _register(definition: Definition) -> None:
    with _lock:
        known = _definitions.setdefault(definition.name, {})
        there = known.get(definition.version)
        if there is not None and _origin(there.model) != _origin(definition.model):
            raise DefinitionError(
                f"Expected one class for {definition.name!r} {definition.version}, got {_origin(definition.model)} "
                f"beside {_origin(there.model)}.",
                remedy="give the new class its own version.",
            )
        known[definition.version] = definition


def _origin(model: type[nn.Module]) -> str:
    return f"{model.__module__}.{model.__qualname__}"


def find_definition(model: type[nn.Module]) -> Definition | None:
    """Return what was declared of exactly this class, or None."""
    definition = vars(model).get(_MARK)
    return definition if isinstance(definition, Definition) else None


def find_definitions(name: str) -> tuple[Definition, ...]:
    """Return every registered version of `name`, newest first."""
    with _lock:
        known = list(_definitions.get(name, {}).values())
    return tuple(sorted(known, key=lambda definition: definition.version, reverse=True))


def find_migrations(name: str) -> Migrations:
    """Return the migrations of the model `name`, one object for all its versions; empty until steps are registered."""
    with _lock:
        return _migrations.setdefault(name, Migrations(name))


def migrations_of(model: type[nn.Module] | str) -> Migrations:
    """Return the migrations of a model: of the name that its class was declared with, or of the name itself.

    Raises:
        DefinitionError: the class, or the nearest base that was declared, has no name.
    """
    if isinstance(model, str):
        return find_migrations(model)
    for base in inspect.getmro(model):
        definition = find_definition(base)
        if definition is not None:
            return find_migrations(definition.name)
    raise DefinitionError(
        f"Expected a class with a name and a version, got {_origin(model)}.",
        remedy="decorate it with @hotglm.versioned(name, version), or give the name of the model.",
    )


def read_config(module: nn.Module) -> Mapping[str, Any] | None:
    """Return the fields of the config that a module keeps as `config`: of a dataclass; else None.

    Where a config was declared of the class, of a mapping or a pydantic model too.
    """
    config: Any = getattr(module, "config", None)
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    definition = find_definition(type(module))
    if definition is None or definition.config is None:
        return None
    if isinstance(config, Mapping):
        return dict(config)
    if isinstance(getattr(type(config), "model_fields", None), Mapping):
        fields: Mapping[str, Any] = config.model_dump(mode="json", by_alias=True)
        return fields
    return None
