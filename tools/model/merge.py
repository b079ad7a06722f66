# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Write the shards of a small model as one file, which fills one 1 GiB page instead of one for each shard.

python3 -m tools.model.merge SHARD ... OUTPUT
"""

from __future__ import annotations

import sys
from pathlib import Path

from gguf import GGUFReader, GGUFValueType, GGUFWriter


def merge(shards: list[Path], output: Path) -> None:
    """Write metadata of the first shard, its split aside, and the tensors of all shards, in order."""
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
    for tensor in tensors:
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
    *shards, output = map(Path, sys.argv[1:])
    if not shards:
        print(__doc__, file=sys.stderr)
        return 2
    merge(shards, output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
