"""What safetensors calls torch's dtypes."""

from __future__ import annotations

import torch

from torchferry.errors import CheckpointFormatError, CheckpointValueError
from torchferry.printable import printable

__all__ = ["dtype_name", "torch_dtype"]

_NAMES = {
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
_DTYPES: dict[str, torch.dtype] = {
    name: dtype for name, attribute in _NAMES.items() if (dtype := getattr(torch, attribute, None)) is not None
}
_NAME_OF = {dtype: name for name, dtype in _DTYPES.items()}


def torch_dtype(name: str, url: str) -> torch.dtype:
    """The dtype of a name.

    Raises:
        CheckpointFormatError: this torch has none.
    """
    if name not in _DTYPES:
        raise CheckpointFormatError(f"{url} has tensors of dtype {name}, which torch {torch.__version__} has not.")
    return _DTYPES[name]


def dtype_name(dtype: torch.dtype, tensor: str) -> str:
    """The name of a tensor's dtype.

    Raises:
        CheckpointValueError: safetensors has none.
    """
    if dtype not in _NAME_OF:
        raise CheckpointValueError(
            f"safetensors has no dtype for {printable(tensor)!r}, which is {dtype}: convert it, or use format='torch'."
        )
    return _NAME_OF[dtype]
