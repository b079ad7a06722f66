# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The report of three hosts of the lab, each with another kind of fault, as a reader's browser shows it.

Needs root and the packages of lab/packages.txt; takes about a minute.
Run: pytest -m lab tests/acceptance/test_report_lab.py; CPULLM_REPORT_PICTURES=FOLDER keeps a picture.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.cpullm.epyc.plugins.module_utils import _manifest
from playwright.sync_api import sync_playwright

from tests.support import lab_command
from tests.unit.test_plan import manifest

CLONE = Path(__file__).resolve().parents[2]
MODEL = CLONE / "tests" / "models" / "recite"
# Bare; with a model that is too large for it; and switched off.
BARE, SMALL, OFF = HOSTS = ("test-report-a", "test-report-b", "test-report-c")

pytestmark = pytest.mark.lab


def lab(*words: str) -> str:
    """Return what the lab's command line prints."""
    return lab_command.lab(*words).stdout


def play(folder: Path, playbook: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Return what comes of a playbook on the three hosts."""
    command = ["ansible-playbook", f"playbooks/{playbook}", "-i", str(folder / "hosts.yml")]
    command += ["-i", str(folder / "locks.yml"), "-i", "inventories/lab", *words]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(CLONE / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    return subprocess.run(command, cwd=CLONE, env=environment, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give the file of the report on the three hosts."""
    folder = tmp_path_factory.mktemp("fleet")
    locks = {"recite": _manifest.manifest_of_directory(str(MODEL), None, None, lambda *_told: None), "r1": manifest()}
    for name, model in locks.items():
        (folder / f"{name}.json").write_text(_manifest.lock_text(model), encoding="utf-8")
    try:
        lab("up", "--kind", "container", *HOSTS)
        inventory = lab("inventory", *HOSTS)
        lab("stop", OFF)
        (folder / "hosts.yml").write_text(inventory, encoding="utf-8")
        (folder / "locks.yml").write_text(
            f"all:\n  vars:\n    host_plan_lock: {folder}/recite.json\n"
            f"  hosts:\n    {SMALL}:\n      host_plan_lock: {folder}/r1.json\n",
            encoding="utf-8",
        )
        done = play(folder, "report.yml", "-e", f"report_file={folder}/fleet.html")
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        yield folder / "fleet.html"
    finally:
        lab("down", *HOSTS)


def test_each_host_s_fault_is_read_in_a_browser(page: Path) -> None:
    errors: list[str] = []
    requests: list[str] = []
    with sync_playwright() as playwright:
        program = shutil.which("chromium")
        assert program, "found no chromium, expected the Debian package of requirements/apt.txt: make setup"
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        view = chromium.new_page(viewport={"width": 1280, "height": 900})
        view.on("console", lambda message: errors.append(message.text))
        view.on("pageerror", lambda error: errors.append(str(error)))
        view.on("request", lambda request: requests.append(request.url))
        view.goto(page.as_uri(), wait_until="networkidle")
        rows = {
            name: view.locator(".fleet tbody tr", has=view.get_by_role("link", name=name, exact=True)).inner_text()
            for name in HOSTS
        }
        sections = {
            name: view.locator("section", has=view.get_by_role("heading", name=name)).inner_text() for name in HOSTS
        }
        if pictures := os.environ.get("CPULLM_REPORT_PICTURES"):
            view.screenshot(path=Path(pictures) / "lab-fleet.png", full_page=True)
        chromium.close()
    for name, state in ((BARE, "NOT SERVING"), (SMALL, "REFUSED"), (OFF, "UNREACHABLE")):
        assert state in rows[name], rows
    assert "the unit is inactive, expected active" in sections[BARE]
    assert "a copy of DeepSeek-R1-Q8_0 takes 668 pages of 1 GiB" in sections[SMALL]
    assert "the connection" in sections[OFF]
    assert (errors, requests) == ([], [page.as_uri()])


def test_all_plans_are_shown_at_once_those_of_refused_hosts_included(page: Path) -> None:
    done = play(page.parent, "plan.yml")
    assert done.returncode not in (0, 1), done.stdout[-4000:]
    shown = done.stdout.partition("TASK [Show the plans")[2].partition("TASK [")[0]
    assert shown.count("ok: [") == 1, done.stdout[-4000:]
    assert f"{BARE}: recite (deepseek2, 3 shard(s)), plan " in shown
    for name in (SMALL, OFF):
        assert f"{name}: no plan, for the reason above" in shown
    for name in (BARE, SMALL):
        assert f"{name}: 1 finding(s) on the hardware" in shown
    assert f"{SMALL}: ansible_facts['cpullm_numa'].nodes[].memory_bytes: found " in done.stdout
