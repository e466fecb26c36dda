"""Assertions, fault injection, golden releases and compatibility matrices, for the tests of those who use hotglm.

Rules this module keeps: like the face of hotglm it imports nothing; each name is fetched from its module on first use,
so that pytest can load the plugin without torch. `tests/test_testing.py` holds the list equal to the modules.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hotglm.testing.assertions import (
        assert_faults_change_nothing,
        assert_no_recompile,
        assert_no_torn_pass,
        assert_refused,
        assert_swap_equals_cold,
    )
    from hotglm.testing.family import ModelFamily
    from hotglm.testing.faults import FAULT_KINDS, FaultPlan, InjectedFaultError
    from hotglm.testing.golden_proof import GoldenProof, assert_goldens_load, verify_golden
    from hotglm.testing.golden_shelf import GoldenShelf
    from hotglm.testing.goldens import GoldenRelease, find_goldens, make_golden, read_golden
    from hotglm.testing.round_trip import assert_round_trip, migrate_state
    from hotglm.testing.traffic import Tolerance, Traffic
    from hotglm.testing.usage import assert_no_leak

__all__ = [
    "FAULT_KINDS",
    "FaultPlan",
    "GoldenProof",
    "GoldenRelease",
    "GoldenShelf",
    "InjectedFaultError",
    "ModelFamily",
    "Tolerance",
    "Traffic",
    "assert_faults_change_nothing",
    "assert_goldens_load",
    "assert_no_leak",
    "assert_no_recompile",
    "assert_no_torn_pass",
    "assert_refused",
    "assert_round_trip",
    "assert_swap_equals_cold",
    "find_goldens",
    "make_golden",
    "migrate_state",
    "read_golden",
    "verify_golden",
]

_EXPORTS = {
    "FAULT_KINDS": "hotglm.testing.faults",
    "FaultPlan": "hotglm.testing.faults",
    "GoldenProof": "hotglm.testing.golden_proof",
    "GoldenRelease": "hotglm.testing.goldens",
    "GoldenShelf": "hotglm.testing.golden_shelf",
    "InjectedFaultError": "hotglm.testing.faults",
    "ModelFamily": "hotglm.testing.family",
    "Tolerance": "hotglm.testing.traffic",
    "Traffic": "hotglm.testing.traffic",
    "assert_faults_change_nothing": "hotglm.testing.assertions",
    "assert_goldens_load": "hotglm.testing.golden_proof",
    "assert_no_leak": "hotglm.testing.usage",
    "assert_no_recompile": "hotglm.testing.assertions",
    "assert_no_torn_pass": "hotglm.testing.assertions",
    "assert_refused": "hotglm.testing.assertions",
    "assert_round_trip": "hotglm.testing.round_trip",
    "assert_swap_equals_cold": "hotglm.testing.assertions",
    "find_goldens": "hotglm.testing.goldens",
    "make_golden": "hotglm.testing.goldens",
    "migrate_state": "hotglm.testing.round_trip",
    "read_golden": "hotglm.testing.goldens",
    "verify_golden": "hotglm.testing.golden_proof",
}
"""The module that each public name is fetched from."""

if not TYPE_CHECKING:  # a type checker that saw this would take every misspelt name for a public one

    def __getattr__(name: str) -> object:
        """Fetch a public name from its module, and keep it."""
        if name not in _EXPORTS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value: object = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
