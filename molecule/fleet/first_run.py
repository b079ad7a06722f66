# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The run on which the second of three hosts fails: what was built, fetched, served and left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "resources"))
import site_run
from recite_checks import rows

HOSTS = ("test-fleet-a", "test-fleet-b", "test-fleet-c")
COMPILE = "cpullm.epyc.llamacpp_build : compile | Compile the engine"
FETCH = "cpullm.epyc.model_fetch : Fetch | Fetch and verify recite"
FAIL = "cpullm.epyc.systemd_service : Verify | Fail on a difference"


def on(host: str, script: str) -> str:
    """Return what a script prints on a host."""
    argv = [sys.executable, "-m", "lab", "ssh", host, "--", script]
    return subprocess.run(argv, cwd=site_run.CLONE, check=True, capture_output=True, text=True).stdout.strip()


def fetch_time(host: str) -> tuple[float, float]:
    """Return when a host's model directory was made, and when its record was complete."""
    directory = on(host, "dirname /srv/models/recite/*/.cpullm-record.json")
    begin, end = on(host, f"stat --format=%W {directory}; stat --format=%Y {directory}/.cpullm-record.json").split()
    return float(begin), float(end)


def forget_artifact(inventory: str) -> None:
    """Remove an earlier run's artifact of this scenario's build, so that a build is needed."""
    cache = Path(os.environ.get("CPULLM_CACHE") or Path.home() / ".cache" / "cpullm")
    check = site_run.play(inventory, "--inventory=inventories/lab", "--check", "--tags=build")
    words = {word.strip("\"',") for word in check.output.split()}
    for artifact in (cache / "artifacts").glob("*.tar.gz*"):
        if artifact.name.split(".tar.gz")[0] in words:
            artifact.unlink()


def report_of_the_broken_fleet(inventory: str, file: Path) -> None:
    """Read the fleet as it is, and see that its report names each host's state and the fault."""
    words = ["--inventory=inventories/lab", f"--extra-vars=report_file={file}"]
    run = site_run.play(inventory, *words, playbook="playbooks/report.yml")
    assert run.status == 0, "the report failed on a fleet with faults"
    page = file.read_text(encoding="utf-8")
    assert [state for _host, state in rows(page)] == ["SERVING", "NOT AS PLANNED", "NOT SERVING"], rows(page)
    assert "HugetlbPages is 0 kB, expected 1048576 kB" in page


def main() -> int:
    """Run the site once and look at every host."""
    inventory = f"{sys.argv[1]}/inventory"
    forget_artifact(inventory)
    run = site_run.play(inventory, "--inventory=inventories/lab")
    built = [host for host in HOSTS if COMPILE in run.changed.get(host, [])]
    assert built == ["test-fleet-a"], f"built on {built}, expected once, on the first host"
    fetched = [host for host in HOSTS if FETCH in run.changed.get(host, [])]
    assert fetched == list(HOSTS), f"fetched on {fetched}, expected on all"
    times = [fetch_time(host) for host in HOSTS]
    assert max(begin for begin, _ in times) <= min(end for _, end in times), f"not side by side: {times}"
    assert run.status != 0, "the run ended green with a host that serves from the wrong pages"
    assert run.failed == {"test-fleet-b": [FAIL]}, f"failed: {run.failed}"
    assert "HugetlbPages is 0 kB, expected 1048576 kB" in run.output
    assert on("test-fleet-a", "systemctl is-active llama-server@0") == "active"
    untouched = on("test-fleet-c", "ls -d /etc/systemd/system/llama-server* /opt/llama.cpp/current 2>/dev/null | wc -l")
    assert untouched == "0", "the host after the failed one was touched"
    report_of_the_broken_fleet(inventory, Path(sys.argv[1]) / "report-broken.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
