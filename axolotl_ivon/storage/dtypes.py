"""The dtypes of tensors under the names of the safetensors format, in numpy; nothing here imports torch."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

_TYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
# Every dtype that the tensors of an adapter may have.
NUMPY: dict[str, np.dtype[Any]] = {name: np.dtype(kind) for name, kind in _TYPES.items()}
FLOATS = ("F64", "F32", "F16", "BF16")
# "bfloat16" -> "BF16": numpy and torch call a dtype alike, and so do users.
SAFETENSORS = {dtype.name: name for name, dtype in NUMPY.items()}
# What a user may choose for floating-point output.
CHOICES = ("float32", "bfloat16", "float16")
