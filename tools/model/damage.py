# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Copy a model with one fault in it, so that a test can show that its check finds the fault.

Run from the checkout's root: python3 -m tools.model.damage FIRST_SHARD DIRECTORY expert:1:5
Needs numpy and gguf. Faults: gating:softmax, expert:LAYER:NUMBER (its output becomes nothing), scale:FACTOR (of
the routed experts), bias (the selection bias becomes nothing), bit (the lowest bit of the last weight flips).
"""

from __future__ import annotations

import argparse
import shutil
import struct
import sys
from pathlib import Path

import gguf

from .gguf_file import shard_paths


def damage(first: Path, directory: Path, fault: str) -> Path:
    """Copy the model's shards to `directory` with one fault and return the first copy; ValueError if it cannot be."""
    kind, *details = fault.split(":")
    directory.mkdir(parents=True, exist_ok=True)
    copies = [Path(shutil.copy(path, directory / path.name)) for path in shard_paths(first)]
    if kind == "gating" and details == ["softmax"]:
        _write_value(copies[0], "expert_gating_func", struct.pack("<I", gguf.ExpertGatingFuncType.SOFTMAX))
    elif kind == "scale" and len(details) == 1:
        _write_value(copies[0], "expert_weights_scale", struct.pack("<f", float(details[0])))
    elif kind == "expert" and len(details) == 2:
        _zero_expert(copies, int(details[0]), int(details[1]))
    elif fault == "bias":
        _zero_biases(copies)
    elif fault == "bit":
        _flip_bit(copies[-1])
    else:
        raise ValueError(f"unknown fault {fault!r}")
    return copies[0]


def _write_value(path: Path, key: str, packed: bytes) -> None:
    """Replace the value of an architecture's key, of the same size, in place."""
    reader = gguf.GGUFReader(path)
    field = reader.fields[f"{reader.fields['general.architecture'].contents()}.{key}"]
    # The value is the field's last part; the field begins with the key's length.
    start = field.offset + sum(part.nbytes for part in field.parts[:-1])
    if field.parts[-1].nbytes != len(packed):
        raise ValueError(f"{path}: {key} has {field.parts[-1].nbytes} bytes, not {len(packed)}")
    with path.open("r+b") as file:
        file.seek(start)
        file.write(packed)


def _zero_expert(paths: list[Path], layer: int, number: int) -> None:
    name = f"blk.{layer}.ffn_down_exps.weight"
    for path in paths:
        for tensor in gguf.GGUFReader(path).tensors:
            if tensor.name == name:
                experts = tensor.data.shape[0]
                if not 0 <= number < experts:
                    raise ValueError(f"{name} has {experts} experts, there is no number {number}")
                size = tensor.n_bytes // experts
                _overwrite(path, int(tensor.data_offset) + number * size, bytes(size))
                return
    raise ValueError(f"{paths[0].parent}: no tensor {name} found")


def _zero_biases(paths: list[Path]) -> None:
    for path in paths:
        for tensor in gguf.GGUFReader(path).tensors:
            if tensor.name.endswith("exp_probs_b.bias"):
                _overwrite(path, int(tensor.data_offset), bytes(int(tensor.n_bytes)))


def _flip_bit(path: Path) -> None:
    """Flip the lowest bit of the last quantised weight, which changes no answer: only a hash finds it."""
    tensor = [t for t in gguf.GGUFReader(path).tensors if t.tensor_type == gguf.GGMLQuantizationType.Q8_0][-1]
    at = int(tensor.data_offset) + int(tensor.n_bytes) - 1
    with path.open("rb") as file:
        file.seek(at)
        byte = file.read(1)[0]
    _overwrite(path, at, bytes([byte ^ 1]))


def _overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first_shard", type=Path)
    parser.add_argument("directory", type=Path, help="where the damaged copy goes")
    parser.add_argument("fault")
    chosen = parser.parse_args()
    try:
        print(damage(chosen.first_shard, chosen.directory, chosen.fault))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
