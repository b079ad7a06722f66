# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""When a run of the kernels' benchmark counts, and what its figures are called."""

from __future__ import annotations

from argparse import Namespace

import pytest

from bench.kernels import Point, Watch, objections, shares, table

LIMITS = Namespace(others=0.1, faults=100)
SIZE = 3 << 30


@pytest.mark.parametrize(
    ("watch", "huge", "others", "faults", "message"),
    [
        pytest.param(Watch(0, {0: 4000}), False, 0.05, 0, None, id="4-KiB"),
        pytest.param(Watch(3 << 20, {0: 4000}), True, 0.0, 100, None, id="1-GiB"),
        pytest.param(Watch(0, {}), False, 0.25, 0, "others took 25% of the CPUs, expected at most 10%", id="others"),
        pytest.param(Watch(0, {}), False, 0, 101, "101 pages came from the disk, expected at most 100", id="disk"),
        pytest.param(Watch(2 << 20, {}), True, 0, 0, "2097152 kB lay in 1 GiB pages, expected the model's", id="few"),
        pytest.param(Watch(1 << 20, {}), False, 0, 0, "1048576 kB lay in 1 GiB pages, expected none", id="unwanted"),
        pytest.param(Watch(0, {0: 900, 1: 100}), False, 0, 0, "memory lay on several nodes", id="nodes"),
    ],
)
def test_a_confounded_run_does_not_count(
    watch: Watch, huge: bool, others: float, faults: int, message: str | None
) -> None:
    found = objections(watch, SIZE, huge, others, faults, LIMITS)
    assert len(found) == (message is not None)
    assert message is None or message in found[0]


@pytest.mark.parametrize(
    ("point", "name"),
    [
        pytest.param(Point(512, 0, 0, 1), "pp512_t1", id="prefill"),
        pytest.param(Point(0, 32, 4096, 2), "tg32_d4096_t2", id="decode-at-depth"),
    ],
)
def test_points_are_named_as_the_results_are(point: Point, name: str) -> None:
    assert point.name == name


def test_share_of_bandwidth_spans_the_extremes_of_both() -> None:
    figures = {"tg64_t2_patched": 40.0, "tg64_t2_patched_min": 36.0, "tg64_t2_patched_max": 44.0}
    figures |= {"read_bandwidth_t2_gbs": 50.0, "read_bandwidth_t2_gbs_min": 45.0, "read_bandwidth_t2_gbs_max": 60.0}
    assert shares(figures, 10**9, 2) == {
        "tg64_t2_share_of_bandwidth": 0.8,
        "tg64_t2_share_of_bandwidth_min": 0.6,
        "tg64_t2_share_of_bandwidth_max": 0.978,
    }


def test_table_shows_each_ratio_beside_its_rates_and_the_share() -> None:
    def spread(name: str, middle: float) -> dict[str, float]:
        return {name: middle, f"{name}_min": middle - 1, f"{name}_max": middle + 1}

    figures = spread("pp512_t2_stock", 90) | spread("pp512_t2_patched", 400) | spread("pp512_t2_ratio", 4.4)
    figures |= spread("pages_tg64_t2_4k", 50) | spread("pages_tg64_t2_1g", 51) | spread("pages_tg64_t2_ratio", 1.02)
    figures |= spread("read_bandwidth_t2_gbs", 75) | spread("tg64_t2_share_of_bandwidth", 1.8)
    _title, prefill, pages, share = table(figures)
    assert prefill.split() == [
        *("pp512_t2", "stock", "90.00", "(89.00", "to", "91.00)", "patched", "400.00", "(399.00", "to", "401.00)"),
        *("4.400", "(3.400", "to", "5.400)"),
    ]
    assert pages.split()[:3] == ["pages_tg64_t2", "4k", "50.00"]
    assert pages.endswith("1g 51.00 (50.00 to 52.00)   1.020 (0.020 to 2.020)")
    assert share == "tg64_t2_share_of_bandwidth: 1.800 (0.800 to 2.800) of 75.0 (74.0 to 76.0) GB/s"
