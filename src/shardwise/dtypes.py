"""safetensors dtype codes and torch dtypes, both ways."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from shardwise.errors import MisuseError
from shardwise.geometry import DTYPE_BYTES, TORCH_NAMES

if TYPE_CHECKING:
    import torch

#: The floating-point types that models compute in: the code, and torch's name.
FLOATS = {code: TORCH_NAMES[code] for code in ("F64", "F32", "F16", "BF16")}
#: torch's name of a dtype -> its code.
CODES = {name: code for code, name in TORCH_NAMES.items()}


@cache
def _tables() -> tuple[dict[str, torch.dtype], dict[torch.dtype, str]]:
    import torch

    by_code: dict[str, torch.dtype] = {code: getattr(torch, name) for code, name in TORCH_NAMES.items()}
    return by_code, {dtype: code for code, dtype in by_code.items()}


def torch_dtype(code: str) -> torch.dtype:
    """Return the torch dtype of a safetensors dtype code; `MisuseError` if there is none."""
    found = _tables()[0].get(code)
    if found is None:
        raise MisuseError(f"{code!r} is not a known dtype code", hint=f"Use one of {', '.join(DTYPE_BYTES)}.")
    return found


def dtype_code(dtype: torch.dtype, name: str | None = None) -> str:
    """Return the safetensors dtype code of a torch dtype; ``name`` is the tensor's, for the error.

    `MisuseError` for dtypes without a whole-byte code in the format (complex128, quantized and sub-byte ones).
    """
    code = _tables()[1].get(dtype)
    if code is None:
        raise MisuseError(
            f"the dtype {dtype} cannot be stored in a safetensors file",
            tensor=name,
            hint="Convert or view the tensor as one that the format has, for example bytes with view(torch.uint8).",
        )
    return code
