# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""On a bare host, check mode names the changes that the real run then makes, and changes nothing itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "resources"))
import site_run

HOST = "test-container"
# What cannot be foreseen on a bare host, as docs/check-mode.md lists it, or is named by another task there.
UNFORESEEN = {
    "Build the engine": {
        "cpullm.epyc.llamacpp_build : compile | Install the build tools",
        "cpullm.epyc.llamacpp_build : compile | Create the work directory",
        "cpullm.epyc.llamacpp_build : compile | Copy the build program",
        "cpullm.epyc.llamacpp_build : compile | Copy the source",
        "cpullm.epyc.llamacpp_build : compile | Copy the recipe",
        "cpullm.epyc.llamacpp_build : compile | Compile the engine",
        "cpullm.epyc.llamacpp_build : compile | Fetch the artifact into the controller's cache",
        "cpullm.epyc.llamacpp_build : install | Install the libraries that the engine needs",
    },
    "Install the downloader": {"cpullm.epyc.model_fetch : Fetch | Install the downloader"},
    "Install the front": {"cpullm.epyc.systemd_service : Front | Install HAProxy"},
}
# The other way round: named in check mode in the place of the tasks above.
STANDS_FOR = {
    "cpullm.epyc.llamacpp_build : compile | Look for the build tools",
    "cpullm.epyc.model_fetch : Fetch | Name the package that check mode leaves out",
    "cpullm.epyc.systemd_service : Front | Name the package that check mode leaves out",
}


def files() -> str:
    """Return every file of the host that a role could have written."""
    script = "find /etc /usr/local /opt /srv /var/lib/cpullm -xdev -newer /etc/machine-id -type f 2>/dev/null | sort"
    argv = [sys.executable, "-m", "lab", "ssh", HOST, "--", script]
    return subprocess.run(argv, cwd=site_run.CLONE, check=True, capture_output=True, text=True).stdout


def main() -> int:
    """Run both and compare."""
    inventory = f"{sys.argv[1]}/inventory"
    words = ["--inventory=inventories/lab"]
    before = files()
    check = site_run.play(inventory, "--check", "--diff", *words)
    assert check.status == 0, "check mode failed on the bare host"
    assert files() == before, "check mode changed the host"
    real = site_run.play(inventory, *words)
    assert real.status == 0, "the run failed"
    unforeseen = set().union(*UNFORESEEN.values())
    named, made = set(check.changed.get(HOST, [])), set(real.changed.get(HOST, []))
    assert len(made) > 5, f"the output was not understood: {made}"
    assert made - named <= unforeseen, f"changed without being named: {sorted(made - named - unforeseen)}"
    assert named - made <= STANDS_FOR, f"named and not changed: {sorted(named - made - STANDS_FOR)}"
    return 0


if __name__ == "__main__":
    sys.exit(main())
