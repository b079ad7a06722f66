# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""After the repair all three serve the same text from the same build."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "resources"))
from recite_checks import hugetlb_kib, name_of, recites, rows


def test_recites_from_where_its_weights_are_wanted(host):
    answer = recites(host)
    assert answer["ok"], answer
    assert hugetlb_kib(host) == (0 if name_of(host) == "test-fleet-a" else 1048576)


def test_only_the_first_host_has_what_building_needs(host):
    assert host.package("cmake").is_installed == (name_of(host) == "test-fleet-a")


def test_the_report_has_a_row_for_each_host(host):
    page = (Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "report.html").read_text(encoding="utf-8")
    assert (name_of(host), "SERVING") in rows(page)
    assert len(rows(page)) == 3
