"""The dtypes of tensors under the names of the safetensors format, in numpy; nothing here imports torch."""

from __future__ import annotations

from typing import Any

import ml_dtypes  # noqa: F401 (teaches numpy the name bfloat16)
import numpy as np

# Every dtype that the tensors of an adapter may have: numpy and torch call it alike, and so do users.
SAFETENSORS = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
NUMPY: dict[str, np.dtype[Any]] = {short: np.dtype(name) for name, short in SAFETENSORS.items()}
FLOATS = ("F64", "F32", "F16", "BF16")
