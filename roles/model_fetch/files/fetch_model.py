# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fetch and verify the shards of a model. Runs on the host beside a copy of plugins/module_utils/_shards.py."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from _shards import FetchError, fetch


def main() -> int:
    """Fetch what a request names."""
    parser = argparse.ArgumentParser(description="Fetch and verify the shards of a model.")
    parser.add_argument("--request", type=Path, required=True, help="JSON file; removed once it is read")
    parser.add_argument("--status", type=Path, help="JSON file that shows how far the work is")
    options = parser.parse_args()
    # The server's own account reads what root fetches.
    os.umask(0o022)
    try:
        request = json.loads(options.request.read_text(encoding="utf-8"))
        options.request.unlink()
        print(json.dumps({"fetched": fetch(request, options.status)}))
    except (FetchError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
