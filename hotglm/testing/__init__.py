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
    from hotglm.testing.faults import FAULT_KINDS, FaultPlan, InjectedFaultError
    from hotglm.testing.traffic import Tolerance, Traffic
    from hotglm.testing.usage import assert_no_leak

__all__ = [
    "FAULT_KINDS",
    "FaultPlan",
    "InjectedFaultError",
    "Tolerance",
    "Traffic",
    "assert_faults_change_nothing",
    "assert_no_leak",
    "assert_no_recompile",
    "assert_no_torn_pass",
    "assert_refused",
    "assert_swap_equals_cold",
]
