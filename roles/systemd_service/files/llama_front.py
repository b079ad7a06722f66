# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tell the front that an instance cannot answer: its unit calls this before each start and after each end.

A server listens before its model is loaded, and answers 503 until then. The front's next look at /health brings the
instance back as soon as it is ready. Where no front runs there is nobody to tell.
"""

from __future__ import annotations

import contextlib
import socket
import sys

SOCKET = "/run/haproxy/admin.sock"


def down(number: int) -> None:
    """Take an instance out until it is healthy again; what it works on goes on."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(5)
        connection.connect(SOCKET)
        connection.sendall(f"set server llama/i{number} health down\n".encode())
        connection.recv(4096)


if __name__ == "__main__":
    down(int(sys.argv[1]))
