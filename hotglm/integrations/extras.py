"""What to say where an integration's package is not there, or is another version than it is written for."""

from __future__ import annotations

from hotglm.errors import MissingExtraError

__all__ = ["TRANSFORMERS", "missing_model_signing", "missing_transformers"]

TRANSFORMERS = "5.12"
"""The first transformers whose registry knows scopes, and whose entries can be turned round anchored."""


def missing_model_signing(found: str) -> MissingExtraError:
    """Return the error for a model-signing that is not there, or that cannot be imported."""
    return MissingExtraError(
        f"Expected the package model-signing, which verifies bundles, got {found}.",
        remedy="install it: pip install 'hotglm[model-signing]'; nothing is taken for verified without it.",
    )


def missing_transformers(found: str) -> MissingExtraError:
    """Return the error for a transformers that is not there or too old."""
    return MissingExtraError(
        f"Expected transformers {TRANSFORMERS} or later, with its conversion registry, got {found}.",
        remedy="install it: pip install 'hotglm[hf]'; checkpoints whose names are the model's load without it.",
    )
