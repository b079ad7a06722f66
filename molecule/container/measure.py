# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The serving host is measured as an operator does it: killed midway, disturbed, refused, and two settings in turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "resources"))
import site_run

sys.path.insert(0, str(site_run.CLONE))
from tests.support import plays

HOST = "test-container"
PLAYBOOK = "playbooks/benchmark.yml"
PAGES = 2
SHORT = {
    "benchmark_lengths": [64, 9000],
    "benchmark_depths": [0, 256],
    "benchmark_tokens": 16,
    "benchmark_repeats": 2,
    "benchmark_bandwidth_s": 0.2,
    # The machine is shared with other tests; what disturbs is tested by itself below.
    "benchmark_other_load": 1.0,
    # As the scenario has it at this point: pages for one copy of the weights, and none to share.
    "systemd_service_weights": "anonymous",
}
ONE_THREAD = {"name": "one-thread", "arguments": ["--threads", "1", "--threads-batch", "1"]}


def ssh(script: str, check: bool = True) -> str:
    """Return what a shell on the host prints."""
    argv = [sys.executable, "-m", "lab", "ssh", HOST, "--", script]
    return subprocess.run(argv, cwd=site_run.CLONE, check=check, capture_output=True, text=True).stdout.strip()


def words(folder: Path, **settings: Any) -> list[str]:
    """Return what a play is given."""
    given = {**SHORT, "benchmark_directory": str(folder), **settings}
    return ["--inventory=inventories/lab", f"--extra-vars={json.dumps(given)}"]


def result_of(folder: Path) -> dict[str, Any]:
    """Return the one result of a folder."""
    (path,) = folder.glob("*.json")
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def nothing_is_left() -> None:
    """Check that the host serves from its pages, and nothing else of a measurement is there."""
    assert ssh("systemctl is-active llama-server@0") == "active"
    assert ssh("ls /run/cpullm/benchmark /run/systemd/system/cpullm-* 2>/dev/null", check=False) == ""
    assert ssh("pgrep --count llama-server") == "1"


def killed_and_found(inventory: str, folder: Path) -> None:
    """A play that is killed midway loses nothing: the next one follows the work and keeps its result."""
    given = words(folder, benchmark_downtime_allowed=True)
    argv = ["ansible-playbook", PLAYBOOK, "--inventory", inventory, *given]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(site_run.CLONE / "ansible.cfg"), plays.MARK: str(folder)}
    with subprocess.Popen(argv, cwd=site_run.CLONE, env=environment, stdout=subprocess.DEVNULL):
        begun = "for i in $(seq 1200); do test -e /run/cpullm/benchmark/status.json && exit 0; sleep 0.1; done; exit 1"
        ssh(begun)
        plays.kill(folder)
    assert not list(folder.glob("*")), "the play was over before it was killed"
    again = site_run.play(inventory, *given, playbook=PLAYBOOK)
    assert again.status == 0
    assert "was begun before, and is followed" in again.output
    result = result_of(folder)
    (measurement,) = result["measurements"]
    for figure in ("read", "prefill_64", "decode_d0", "decode_d256", "load", "restart"):
        assert result["figures"][f"instance0_{figure}"] > 0, figure
    assert [row["figure"] for row in measurement["omitted"]] == ["prefill_9000", "batch"]
    huge = [row for row in measurement["memory_after"]["pages"] if row["size_kib"] == 1048576]
    assert sum(row["kib"] for row in huge) == PAGES << 20, huge
    assert len(result["plan"]) == 64
    assert measurement["build"].startswith("0.")


def disturbed(inventory: str, folder: Path) -> None:
    """Of a host on which something else computes, no speed is kept, and the table says why."""
    load = "for i in $(seq $(nproc)); do setsid sh -c 'while :; do :; done' >/dev/null 2>&1 & echo $!; done"
    busy = ssh(load).split()
    try:
        given = words(folder, benchmark_other_load=0.05, benchmark_repeats=1, benchmark_depths=[], benchmark_tokens=32)
        run = site_run.play(inventory, *given, playbook=PLAYBOOK)
    finally:
        ssh(f"kill {' '.join(busy)}")
    assert run.status == 0
    result = result_of(folder)
    runs = [row for row in result["measurements"][0]["runs"] if row["figure"] == "prefill_64"]
    assert len(runs) == 3, "a disturbed run is repeated twice"
    assert all(any("other processes took" in reason for reason in row["reasons"]) for row in runs), runs
    assert "instance0_prefill_64" not in result["figures"]
    assert "disturbed: instance 0, running, prefill_64: 3 run(s) do not count" in run.output


def in_turns(inventory: str, folder: Path) -> None:
    """Where the pages are for one server alone, two settings are refused, and with consent take turns."""
    variants = {"benchmark_variants": [{"name": "running"}, ONE_THREAD]}
    refused = site_run.play(inventory, *words(folder, **variants), playbook=PLAYBOOK)
    assert refused.status == 2
    assert f"need {PAGES} pages of 1 GiB" in refused.output
    assert not list(folder.glob("*"))
    nothing_is_left()
    run = site_run.play(inventory, *words(folder, benchmark_downtime_allowed=True, **variants), playbook=PLAYBOOK)
    assert run.status == 0
    result = result_of(folder)
    assert [row["mode"] for row in result["measurements"]] == ["turns", "turns"]
    (row,) = [row for row in result["ratios"] if row["figure"] == "decode_d256"]
    assert (row["first_name"], row["second_name"]) == ("running", "one-thread")
    assert row["paired"]
    assert row["ratio"]["count"] == 2


def side_by_side(inventory: str, folder: Path) -> None:
    """A variant in the page cache finds room beside the running server, which serves on."""
    before = ssh("systemctl show --property=MainPID --value llama-server@0")
    variants = [{"name": "pages"}, {"name": "page-cache", "environment": {"LLAMA_WEIGHTS_HUGEPAGES": "off"}}]
    run = site_run.play(inventory, *words(folder, benchmark_variants=variants), playbook=PLAYBOOK)
    assert run.status == 0
    result = result_of(folder)
    pages, cache = result["measurements"]
    assert (pages["mode"], pages["memory_after"]["huge_kib"], cache["memory_after"]["huge_kib"]) == (
        "beside",
        PAGES << 20,
        0,
    )
    assert result["figures"]["instance0_ratio_prefill_64"] > 0
    assert ssh("systemctl show --property=MainPID --value llama-server@0") == before


def main() -> int:
    """Run all of it."""
    inventory, work = f"{sys.argv[1]}/inventory", Path(sys.argv[1]) / f"measured-{int(time.time())}"
    work.mkdir()
    for check in (killed_and_found, disturbed, in_turns, side_by_side):
        folder = work / check.__name__
        folder.mkdir()
        check(inventory, folder)
        nothing_is_left()
    return 0


if __name__ == "__main__":
    sys.exit(main())
