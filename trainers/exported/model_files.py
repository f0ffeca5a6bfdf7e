"""Files of a model's folder, which anybody may have written: bounded and checked, each error naming its file."""

import json
import math
import re
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from cluster.console.errors import UserError
from cluster.storage.uris import Store

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_JSON_BYTES = 64 << 20
"""Of config.json and of an index, which has 100 bytes a tensor."""
MAX_HEADER_BYTES = 100_000_000
"""safetensors' own limit."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_PLAIN_NAME = re.compile(r"[\w.-]+\.safetensors")


class ModelFolderError(UserError, ValueError):
    """A folder's model cannot be loaded; the message names the file and what in it is wrong."""


def read_json(source: Store, path: str) -> dict[str, Any]:
    """A JSON object of a folder.

    Raises:
        FileNotFoundError: it is not there.
        ModelFolderError: it is too large, or something else.
    """
    at = f"{source.uri}/{path}"
    if (size := source.size(path)) > MAX_JSON_BYTES:
        raise ModelFolderError(f"{at} has {size:,} bytes; it has {MAX_JSON_BYTES:,} at most")
    try:
        found = json.loads(source.read(path))
    except (ValueError, RecursionError) as broken:
        raise ModelFolderError(f"{at} is not readable JSON: {broken}") from None
    if not isinstance(found, dict):
        raise ModelFolderError(f"{at} is no JSON object")
    return found


@dataclass(frozen=True)
class Fields:
    """Values of a config.json. What is missing has the default of transformers' class, if there is one."""

    values: Mapping[str, Any]
    at: str
    """The file, for messages."""

    def whole(self, key: str, default: int | None = None) -> int:
        """A number of things: 1 to 2^24, which no model reaches."""
        value = self._given(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1 << 24:
            raise ModelFolderError(f"{self.at}: {key}={_shown(value)} is no whole number from 1 to 2^24")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._given(key, default)
        if (
            not isinstance(value, (int, float))
            or isinstance(value, bool)
            or not 0 < value <= sys.float_info.max
        ):
            raise ModelFolderError(f"{self.at}: {key}={_shown(value)} is no finite number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._given(key, default)
        if not isinstance(value, bool):
            raise ModelFolderError(f"{self.at}: {key}={_shown(value)} is neither true nor false")
        return value

    def section(self, key: str) -> "Fields":
        """The object at a key; empty where it is missing or null."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise ModelFolderError(f"{self.at}: {key}={_shown(value)} is no object")
        return Fields(value or {}, f"{self.at}: {key}")

    def _given(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise ModelFolderError(f"{self.at}: {key} is missing")
        return value


def weight_files(source: Store) -> list[str]:
    """The files that hold the weights, by their index where there are several.

    Raises:
        ModelFolderError: the index is no index, or names what is no safetensors file of the folder.
    """
    if not source.exists(INDEX):
        return [WEIGHTS]
    named = read_json(source, INDEX).get("weight_map")
    at = f"{source.uri}/{INDEX}"
    if not isinstance(named, dict) or not named:
        raise ModelFolderError(f"{at}: weight_map is no table of tensors")
    for file in named.values():
        if not isinstance(file, str) or not _PLAIN_NAME.fullmatch(file):
            raise ModelFolderError(f"{at} names {_shown(file)}, which is no safetensors file of the folder")
    return sorted(set(named.values()))


def read_header(source: Store, file: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, without memory.

    Raises:
        FileNotFoundError: it is not there.
        ModelFolderError: the file is not one, or its tensors do not fill it.
    """
    at, size = f"{source.uri}/{file}", source.size(file)
    length = struct.unpack("<Q", source.read_range(file, 0, 8))[0] if size >= 8 else size
    if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
        raise ModelFolderError(
            f"{at} is not readable safetensors: no header of {length:,} bytes is in {size:,}"
        )
    try:
        header = json.loads(source.read_range(file, 8, length))
        header.pop("__metadata__", None)
        tensors, extents = {}, []
        for name, entry in header.items():
            dtype, shape, (start, stop) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if any(type(n) is not int or n < 0 for n in (*shape, start, stop)):
                raise ValueError(f"{name} has a shape or offsets that are no numbers")
            if math.prod(shape) * dtype.itemsize != stop - start:
                raise ValueError(f"{name} of shape {tuple(shape)} does not fill its {stop - start:,} bytes")
            tensors[name] = torch.empty(shape, dtype=dtype, device="meta")
            extents.append((start, stop))
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as broken:
        what = f"unknown {broken}" if isinstance(broken, KeyError) else str(broken).partition("\n")[0]
        raise ModelFolderError(f"{at} is not readable safetensors: {what}") from None
    reached = 0
    for start, stop in sorted(extents):
        if start != reached:
            raise ModelFolderError(f"{at} is not readable safetensors: its tensors leave a gap or overlap")
        reached = stop
    if reached != size - 8 - length:
        raise ModelFolderError(f"{at} is not readable safetensors: it is cut, or holds more than its tensors")
    return tensors


def read_weights(source: Store, file: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        FileNotFoundError: it is not there.
        ModelFolderError: the file is not one.
    """
    content = source.read(file)
    try:
        return safetensors.torch.load(content)
    # SafetensorError, and what comes of a header that its library lets pass and torch does not
    except Exception as broken:
        raise ModelFolderError(f"{source.uri}/{file} is not readable safetensors: {broken}") from None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:80]}…"
