"""safetensors dtype codes and torch dtypes, both ways."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from shardwise.errors import MisuseError
from shardwise.geometry import DTYPE_BYTES

if TYPE_CHECKING:
    import torch

# Source: the code that safetensors' Python binding (0.8) writes for each torch dtype.
_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}

#: The floating-point types that models compute in: the code, and torch's name.
FLOATS = {code: _TORCH_NAMES[code] for code in ("F64", "F32", "F16", "BF16")}


#: torch's name of a dtype -> its code.
CODES = {name: code for code, name in _TORCH_NAMES.items()}


@cache
def _tables() -> tuple[dict[str, torch.dtype], dict[torch.dtype, str]]:
    import torch

    by_code: dict[str, torch.dtype] = {code: getattr(torch, name) for code, name in _TORCH_NAMES.items()}
    return by_code, {dtype: code for code, dtype in by_code.items()}


def torch_dtype(code: str) -> torch.dtype:
    """Return the torch dtype of a safetensors dtype code.

    Raises:
        MisuseError: ``code`` is not a key of `shardwise.geometry.DTYPE_BYTES`.
    """
    found = _tables()[0].get(code)
    if found is None:
        raise MisuseError(f"{code!r} is not a known dtype code", hint=f"Use one of {', '.join(DTYPE_BYTES)}.")
    return found


def dtype_code(dtype: torch.dtype, name: str | None = None) -> str:
    """Return the safetensors dtype code of a torch dtype.

    Args:
        dtype: Any torch dtype.
        name: Name of the tensor concerned, for the error.

    Raises:
        MisuseError: The format has no whole-byte code for the dtype (complex128, quantized and sub-byte dtypes).
    """
    code = _tables()[1].get(dtype)
    if code is None:
        raise MisuseError(
            f"the dtype {dtype} cannot be stored in a safetensors file",
            tensor=name,
            hint="Convert or view the tensor as one that the format has, for example bytes with view(torch.uint8).",
        )
    return code
