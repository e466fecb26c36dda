"""torch dtypes by name, for the layers above that speak of them as text.

Rules this module keeps: the names are torch's own without the prefix (`float32`), as in `StateSpec.dtype`; a dtype that
this torch does not have is absent, never replaced by a near one.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from hotglm.header import DTYPES

__all__ = ["TORCH_DTYPES", "dtype_name"]

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
)
"""Every dtype of this torch by its name, aliases (`half`) included."""

LOADABLE_DTYPES: frozenset[torch.dtype] = frozenset(
    TORCH_DTYPES[info.torch_name] for info in DTYPES.values() if info.torch_name in TORCH_DTYPES
)
"""The dtypes that torch and safetensors share."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of `dtype` without the `torch.` before it.

    >>> dtype_name(torch.float32)
    'float32'
    """
    return str(dtype).removeprefix("torch.")
