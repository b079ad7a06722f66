# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The one host in a container that serves from a store, for all tests that break or change it: it costs a minute."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.store_host import MODEL, STORE_HOST, StoreHost, store_host


@pytest.fixture(scope="session")
def faulty_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """An ext4 on a loop device, and the file below it: once that is cut short, the device answers EIO."""
    folder = tmp_path_factory.mktemp("disk")
    image, mounted = folder / "image", folder / "mounted"
    mounted.mkdir()
    with image.open("wb") as stream:
        stream.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-b", "4096", "-O", "^has_journal", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop,noatime", str(image), str(mounted)], check=True)
    (mounted / "padding").write_bytes(b"\1" * (40 << 20))
    for shard in MODEL.glob("*.gguf"):
        (mounted / shard.name).write_bytes(shard.read_bytes())
    os.sync()
    try:
        yield image, mounted
    finally:
        # What it still wants to write has nowhere to go.
        subprocess.run(["umount", "--lazy", str(mounted)], check=True)


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory, faulty_disk: tuple[Path, Path]) -> Iterator[StoreHost]:
    """The host; STORE_HOST names it. Its model is one file, in one page; with STORE_MERGED=0 it is three."""
    merged, folder = os.environ.get("STORE_MERGED") != "0", tmp_path_factory.mktemp("store")
    with store_host(STORE_HOST, folder, merged=merged, binds=(f"{faulty_disk[1]}:/mnt/faulty",)) as it:
        yield it
