# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Write the shards of a small model as fewer files, each of which fills a 1 GiB page.

python3 -m tools.model.merge [--files N] SHARD ... OUTPUT
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gguf import GGUFReader, GGUFValueType, GGUFWriter


def merge(shards: list[Path], output: Path, files: int = 1) -> None:
    """Write metadata of the first shard, its split aside, and the tensors of all shards, in order.

    More than one file are named NAME-00001-of-00002.gguf beside the output, as llama.cpp wants it.
    """
    readers = [GGUFReader(shard) for shard in shards]
    writer = GGUFWriter(output, str(readers[0].fields["general.architecture"].contents()))
    for name, field in readers[0].fields.items():
        # The reader shows the file's own header as fields, too.
        if name.startswith(("GGUF.", "split.")) or name == "general.architecture":
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, inner)
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    for number, tensor in enumerate(tensors):
        if number and number * files // len(tensors) != (number - 1) * files // len(tensors):
            writer.tensors.append({})
        writer.add_tensor_info(
            tensor.name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, tensor.tensor_type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data)
    writer.close()


def main() -> int:
    """Merge what the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("shards", type=Path, nargs="+", metavar="SHARD")
    parser.add_argument("output", type=Path)
    parser.add_argument("--files", type=int, default=1)
    options = parser.parse_args()
    merge(options.shards, options.output, options.files)
    return 0


if __name__ == "__main__":
    sys.exit(main())
