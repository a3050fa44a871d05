"""Named tensors in pieces on disk: what the ranks of a run write, and what any other number of ranks reads.

A rank writes one safetensors file, `rank-00000.safetensors`, of fp32 pieces of flattened parameters under the names
`KIND/PARAMETER` (`weight/model.norm.weight`, `exp_avg/...`). `index.json` says which elements lie in which file.
"""

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "index.json"


class Parameter(BaseModel):
    """Where a parameter lies."""

    shape: list[int]
    kinds: list[str]
    """`weight` and the moments that are there."""
    pieces: list[tuple[str, int, int]]
    """File, first element of the flattened parameter, and number of elements; in order, without gap."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Index(BaseModel):
    parameters: dict[str, Parameter]

    def gap(self) -> str | None:
        """The first parameter of which elements are in no file or in several, or None."""
        for name, parameter in self.parameters.items():
            end = 0
            for _, start, size in parameter.pieces:
                if start != end:
                    return name
                end += size
            if end != parameter.size:
                return name
        return None

    @property
    def kinds(self) -> set[str]:
        return {kind for parameter in self.parameters.values() for kind in parameter.kinds}

    @property
    def files(self) -> set[str]:
        return {file for parameter in self.parameters.values() for file, _, _ in parameter.pieces}


def file_of(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a rank's tensors: `KIND/PARAMETER` -> fp32 `[elements]` on the CPU."""
    save_file(dict(tensors), path)


def merge_indices(parts: list[dict[str, Parameter]]) -> Index:
    """One index of what the ranks have written, each in a part of its own."""
    merged: dict[str, Parameter] = {}
    for part in parts:
        for name, parameter in part.items():
            if name in merged:
                merged[name].pieces += parameter.pieces
            else:
                merged[name] = parameter.model_copy(deep=True)
    for parameter in merged.values():
        parameter.pieces.sort(key=lambda piece: piece[1])
    return Index(parameters=merged)


class TensorFiles:
    """The tensors of a checkpoint. Files are mapped; what nobody asks for is never read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = read_index(folder)
        self.parameters, self.kinds = index.parameters, index.kinds
        self._open = lru_cache(64)(lambda file: safe_open(folder / file, framework="pt"))

    def read(self, name: str, kind: str, start: int = 0, size: int | None = None) -> Tensor:
        """Elements `start` to `start` + `size` (all, by default) of a parameter's weight or moment: fp32 `[size]`."""
        parameter = self.parameters[name]
        end = start + (parameter.size - start if size is None else size)
        parts = []
        for file, first, length in parameter.pieces:
            begin, stop = max(start, first), min(end, first + length)
            if begin < stop:
                parts.append(self._open(file).get_slice(f"{kind}/{name}")[begin - first : stop - first])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def whole(self, name: str, kind: str) -> Tensor:
        """A parameter's weight or moment, in its own shape."""
        return self.read(name, kind).view(self.parameters[name].shape)


def read_index(folder: Path) -> Index:
    """
    Raises:
        OSError, ValueError: it is not there, or damaged.
    """
    return Index.model_validate_json((folder / INDEX).read_bytes())


def dump_index(index: Index) -> str:
    values: dict[str, Any] = index.model_dump()
    return json.dumps(values, separators=(",", ":"))
