# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The host as it serves: the right text, from 1 GiB pages, by an account without rights."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "resources"))
from recite_checks import hugetlb_kib, recites


def test_recites_with_the_reference_s_probabilities(host):
    answer = recites(host)
    assert answer["ok"], answer


def test_the_weights_fill_the_planned_pages(host):
    assert hugetlb_kib(host) == 2 * 1048576


def test_the_server_is_an_ordinary_account_on_loopback(host):
    (process,) = host.process.filter(comm="llama-server")
    assert process.user == "llama-server"
    listening = host.check_output("ss --listening --tcp --numeric --no-header 'sport = :8008'").splitlines()
    assert [line.split()[3] for line in listening] == ["127.0.0.1:8008"]


def test_systemd_hardens_the_service(host):
    words = host.check_output("systemd-analyze security --no-pager llama-server@0.service").splitlines()[-1]
    exposure = float(words.split(":")[1].split()[0])
    assert exposure < 3, words


def test_the_journal_holds_no_prompt(host):
    journal = host.check_output("journalctl --no-pager --unit=llama-server@0")
    assert "course of human events" not in journal.lower()
    assert "hugepages: " in journal
    assert "munmap failed" not in journal


def test_the_store_is_complete_and_its_unit_says_so(host):
    shown = host.check_output("systemctl show --property=ActiveState,SubState,StatusText llama-weights@0")
    assert "ActiveState=active" in shown.splitlines()
    assert "StatusText=complete: 0.8 MiB in 2 pages, content " in shown
    words = host.check_output("systemd-analyze security --no-pager llama-weights@0.service").splitlines()[-1]
    assert float(words.split(":")[1].split()[0]) < 3, words


def test_a_restart_reads_nothing(host):
    before = host.check_output("systemctl show --property=InvocationID llama-weights@0")
    files = host.check_output("find /var/lib/llama-weights -type f -printf '%p %i %T@ %C@\\n'")
    host.check_output("systemctl restart llama-server@0")
    assert host.check_output("systemctl show --property=InvocationID llama-weights@0") == before
    assert host.check_output("find /var/lib/llama-weights -type f -printf '%p %i %T@ %C@\\n'") == files
    assert recites(host, cases=("opening",))["ok"]


def test_package_upgrades_leave_the_server_alone(host):
    assert "llama-server@" in host.file("/etc/needrestart/conf.d/60-llama-server.conf").content_string


def test_a_killed_server_comes_back_and_recites(host):
    before = host.check_output("systemctl show --property=MainPID --value llama-server@0")
    host.check_output(f"kill -9 {before}")
    host.check_output(
        "for i in $(seq 300); do"
        f' test "$(systemctl show --property=MainPID --value llama-server@0)" != {before} &&'
        " systemctl is-active --quiet llama-server@0 && exit 0; sleep 0.1; done; exit 1"
    )
    assert recites(host)["ok"]
