"""What the words OLD, NEW and PATH of the command line name: weights, a contract in a file, or somebody's class.

Rules this module keeps:

- A path that exists is a path. A word like `package.module:Name` is imported, torch with it, only if it is none.
- A contract in a file is JSON that ends in `.json` and carries the schema of `Contract.to_dict` or `Released.to_dict`.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from hotglm.commands.console import NAME_KEY, foreign_output, read_declared_version
from hotglm.compatibility import RELEASED_SCHEMA, Released
from hotglm.contract import CONTRACT_SCHEMA, Contract
from hotglm.document import Report, parse_json, verify_utf8
from hotglm.environment import Environment
from hotglm.errors import SourceError, shorten_repr
from hotglm.migration.registry import Migrations
from hotglm.release.environment import read_creation
from hotglm.release.files import open_weights
from hotglm.version import Version

__all__ = ["Subject", "read_subject"]

_DESCRIBED_MODULE = "hotglm.model.described"  # by name: it imports torch
_WORD = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_MAX_CONTRACT_NBYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What one word names.

    Attributes:
        path: the word, or what it led to.
        name: name of the model, where it says one.
        version: its version, where it says one.
        contract: what it promises; of weights, their tensors alone.
        is_file: whether it is weights, which know nothing of the code.
        requires: PEP 508 requirements, those of the contract included.
        made_in: the environment that weights were made in, where they say so.
        migrations: those of the class, where it has any.
    """

    path: str
    name: str | None = None
    version: Version | None = None
    contract: Contract
    is_file: bool = False
    requires: tuple[str, ...] = ()
    made_in: Environment | None = None
    migrations: Migrations | None = None

    def identify(self) -> dict[str, object]:
        """Return path, name and version as JSON values."""
        return {
            "path": self.path,
            "name": self.name,
            "version": None if self.version is None else str(self.version),
        }

    def show(self) -> str:
        """Return path, name and version on one line."""
        parts = [
            shorten_repr(self.path),
            *([f"model {shorten_repr(self.name)}"] if self.name is not None else []),
            f"version {self.version}" if self.version is not None else "no version",
        ]
        return ", ".join(parts)


def read_subject(word: str) -> Subject:
    """Return what `word` names.

    Raises:
        SourceError: weights or a contract that cannot be used.
        ArgumentError: a class that cannot be imported or built, or a contract that `to_dict` did not write.
    """
    if _WORD.fullmatch(word) and not os.path.exists(word):
        with foreign_output():
            found = importlib.import_module(_DESCRIBED_MODULE).read_described(word)
        return Subject(
            path=word,
            name=found.name,
            version=found.version,
            contract=found.contract,
            requires=found.contract.requires,
            migrations=found.migrations,
        )
    if (
        word.endswith(".json")
        and not word.endswith(".index.json")
        and os.path.isfile(word)
        and (document := _read_contract_file(word)) is not None
    ):
        return _read_contract(word, document)
    return _read_weights(word)


def _read_contract_file(path: str) -> Mapping[str, object] | None:
    """Return the document of a contract; None for JSON of another kind, such as a shard index."""
    with open(path, "rb") as file:
        text = file.read(_MAX_CONTRACT_NBYTES + 1)
    headline, remedy = f"Expected a contract in {path!a}", "write it with json.dump(contract.to_dict(), file)."
    report = Report(SourceError, headline=headline, remedy=remedy, prefix="CONTRACT", file=path)
    if len(text) > _MAX_CONTRACT_NBYTES:
        report.stop("CONTRACT_TOO_LARGE", f"Expected at most {_MAX_CONTRACT_NBYTES} bytes, got more.")
    verify_utf8(text, report=report)
    document = parse_json(text, report=report)
    known = isinstance(document, Mapping) and document.get("schema") in (CONTRACT_SCHEMA, RELEASED_SCHEMA)
    return document if known and isinstance(document, Mapping) else None


def _read_contract(path: str, document: Mapping[str, object]) -> Subject:
    if document["schema"] == CONTRACT_SCHEMA:
        contract = Contract.from_dict(document)
        return Subject(path=path, contract=contract, requires=contract.requires)
    released = Released.from_dict(document)
    contract = released.contract
    return Subject(path=path, version=released.version, contract=contract, requires=contract.requires)


def _read_weights(path: str) -> Subject:
    with open_weights(path) as weights:
        entries = ((name, location.entry) for name, location in weights.tensors.items())
        return Subject(
            path=weights.path,
            name=weights.metadata.get(NAME_KEY),
            version=read_declared_version(weights),
            contract=Contract.of_tensors({name: (entry.torch_dtype, entry.shape) for name, entry in entries}),
            is_file=True,
            requires=_read_requires(weights.metadata, path=weights.path),
            made_in=_read_made_in(weights.metadata, weights.config, path=weights.path),
        )


def _read_requires(metadata: Mapping[str, str], *, path: str) -> tuple[str, ...]:
    text = metadata.get("hotglm.requires")
    if text is None:
        return ()
    headline = "Expected a JSON list in metadata 'hotglm.requires'"
    remedy = "write the file with hotglm.save_weights."
    report = Report(SourceError, headline=headline, remedy=remedy, prefix="METADATA", file=path)
    listed = parse_json(text.encode(), report=report)
    return tuple(map(str, listed)) if isinstance(listed, list) else (str(listed),)


def _read_made_in(metadata: Mapping[str, str], config: Mapping[str, object] | None, *, path: str) -> Environment | None:
    """Return what the weights say of their making; a config of Hugging Face names the version of transformers."""
    made_in = read_creation(metadata, file=path)
    version = None if config is None else config.get("transformers_version")
    if made_in is None and isinstance(version, str):
        return Environment(python="", packages={"transformers": version})
    return made_in
