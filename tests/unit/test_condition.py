# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Trees as the kernel shows them: governors, memory errors, sensors on modules, and stacks of disks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ansible_collections.cpullm.epyc.plugins.module_utils import _condition
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.tree_builder import write

PCI = "sys/devices/pci0000:60/0000:60:03.1/0000:61:00.0"
NVME = f"{PCI}/nvme/nvme0"


def link(root: Path, path: str, target: str) -> None:
    """Make a symbolic link below the root, to a place below the root."""
    place = root / path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(root / target)


def block(root: Path, path: str, number: str, *, below: tuple[str, ...] = ()) -> None:
    """Make a block device with that directory and device number, on top of others."""
    name = Path(path).name
    (root / path / "slaves").mkdir(parents=True)
    link(root, f"sys/class/block/{name}", path)
    link(root, f"sys/dev/block/{number}", path)
    for each in below:
        (root / path / "slaves" / each).mkdir()


def nvme(root: Path, speed: str = "16.0 GT/s PCIe", lanes: str = "4") -> None:
    """Make an NVMe disk with two partitions."""
    block(root, f"{NVME}/nvme0n1", "259:0")
    for number in (1, 2):
        block(root, f"{NVME}/nvme0n1/nvme0n1p{number}", f"259:{number}")
        write(root, f"{NVME}/nvme0n1/nvme0n1p{number}/partition", f"{number}\n")
    write(root, f"{NVME}/nvme0n1/queue/rotational", "0\n")
    write(root, f"{NVME}/model", "SAMSUNG MZQL27T6HBLA-00A07              \n")
    link(root, f"{NVME}/nvme0n1/device", NVME)
    link(root, f"{NVME}/device", PCI)
    for name, value in (("current", speed), ("max", "16.0 GT/s PCIe")):
        write(root, f"{PCI}/{name}_link_speed", f"{value}\n")
    write(root, f"{PCI}/current_link_width", f"{lanes}\n")
    write(root, f"{PCI}/max_link_width", "4\n")


DISK = {
    "name": "nvme0n1",
    "model": "SAMSUNG MZQL27T6HBLA-00A07",
    "rotational": False,
    "link": {"gts": 16.0, "lanes": 4, "best_gts": 16.0, "best_lanes": 4},
}


def gather(root: Path, device: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    return _condition.gather("/", str(root), device)


def test_a_host_that_shows_nothing(tmp_path: Path) -> None:
    assert gather(tmp_path) == {"governors": [], "memory_errors": [], "module_temperatures": [], "disks": []}


def test_governors_are_counted_over_their_cpus(tmp_path: Path) -> None:
    base = "sys/devices/system/cpu/cpufreq"
    for policy, governor, cpus in ((0, "schedutil", "0"), (1, "performance", "1 2"), (3, "performance", "3")):
        write(tmp_path, f"{base}/policy{policy}/scaling_governor", f"{governor}\n")
        write(tmp_path, f"{base}/policy{policy}/scaling_driver", "acpi-cpufreq\n")
        write(tmp_path, f"{base}/policy{policy}/affected_cpus", f"{cpus}\n")
    assert gather(tmp_path)["governors"] == [
        {"governor": "performance", "driver": "acpi-cpufreq", "cpus": 3},
        {"governor": "schedutil", "driver": "acpi-cpufreq", "cpus": 1},
    ]


def test_memory_errors_name_the_module(tmp_path: Path) -> None:
    base = "sys/devices/system/edac/mc"
    for controller, corrected in ((0, 7), (1, 0)):
        write(tmp_path, f"{base}/mc{controller}/ce_count", f"{corrected}\n")
        write(tmp_path, f"{base}/mc{controller}/ue_count", "0\n")
    for name, label, corrected in (("dimm0", "", 5), ("dimm1", "P0_DIMMB0", 2), ("dimm2", "P0_DIMMC0", 0)):
        write(tmp_path, f"{base}/mc0/{name}/dimm_label", f"{label}\n")
        write(tmp_path, f"{base}/mc0/{name}/dimm_location", "channel 0 \n")
        write(tmp_path, f"{base}/mc0/{name}/dimm_ce_count", f"{corrected}\n")
        write(tmp_path, f"{base}/mc0/{name}/dimm_ue_count", "0\n")
    assert gather(tmp_path)["memory_errors"] == [
        {"controller": "mc0", "module": None, "corrected": 7, "uncorrected": 0},
        {"controller": "mc0", "module": "channel 0", "corrected": 5, "uncorrected": 0},
        {"controller": "mc0", "module": "P0_DIMMB0", "corrected": 2, "uncorrected": 0},
        {"controller": "mc1", "module": None, "corrected": 0, "uncorrected": 0},
    ]


def test_a_controller_that_prints_something_else_tells_nothing(tmp_path: Path) -> None:
    write(tmp_path, "sys/devices/system/edac/mc/mc0/ce_count", "none\n")
    write(tmp_path, "sys/devices/system/edac/mc/mc0/ue_count", "0\n")
    assert gather(tmp_path)["memory_errors"] == []


def test_sensors_are_those_on_memory_modules(tmp_path: Path) -> None:
    sensors = (
        (0, "spd5118", "1-0051"),
        (1, "k10temp", "0000:00:18.3"),
        (2, "jc42", "0-0018"),
        (3, "spd5118", "1-0050"),
    )
    for number, name, place in sensors:
        device = f"sys/devices/{place}"
        write(tmp_path, f"{device}/hwmon{number}/name", f"{name}\n")
        write(tmp_path, f"{device}/hwmon{number}/temp1_input", f"{40000 + 250 * number}\n")
        if name == "spd5118":
            write(tmp_path, f"{device}/hwmon{number}/temp1_crit", "85000\n")
        link(tmp_path, f"{device}/hwmon{number}/device", device)
        link(tmp_path, f"sys/class/hwmon/hwmon{number}", f"{device}/hwmon{number}")
    assert gather(tmp_path)["module_temperatures"] == [
        {"sensor": "jc42 0-0018", "celsius": 40.5, "critical": None},
        {"sensor": "spd5118 1-0050", "celsius": 40.75, "critical": 85.0},
        {"sensor": "spd5118 1-0051", "celsius": 40.0, "critical": 85.0},
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("", [], id="nothing"),
        pytest.param("CPU1 Temp        | 01h | ok  |  3.1 | 41 degrees C\n", [], id="no-module"),
        pytest.param("P1-DIMMA1 Temp   | 40h | ok  | 32.64 | 48 degrees C\n", [("P1-DIMMA1 Temp", 48.0)], id="module"),
        pytest.param("P1-DIMMB1 Temp   | 41h | ns  | 32.65 | No Reading\n", [], id="empty-slot"),
        pytest.param("DIMM_P0_A0       | 41h | ok  | 32.65 | 48.500 degrees C", [("DIMM_P0_A0", 48.5)], id="fraction"),
        pytest.param("DIMM\nDIMM 48 degrees C\n| | |\n", [], id="not-a-table"),
    ],
)
def test_sensors_of_the_board_s_controller(text: str, expected: list[tuple[str, float]]) -> None:
    rows = _condition.parse_ipmi_temperatures(text)
    assert [(row.sensor, row.celsius) for row in rows] == expected


@given(st.text())
def test_any_text_of_a_controller_is_read(text: str) -> None:
    assert all(row.critical is None for row in _condition.parse_ipmi_temperatures(text))


@pytest.mark.parametrize("device", [(259, 0), (259, 2)], ids=["disk", "partition"])
def test_a_disk(device: tuple[int, int], tmp_path: Path) -> None:
    nvme(tmp_path)
    assert gather(tmp_path, device)["disks"] == [DISK]


def test_a_mapping_on_a_raid_on_partitions(tmp_path: Path) -> None:
    nvme(tmp_path)
    block(tmp_path, "sys/devices/virtual/block/sda", "8:0")
    write(tmp_path, "sys/devices/virtual/block/sda/queue/rotational", "1\n")
    block(tmp_path, "sys/devices/virtual/block/md0", "9:0", below=("nvme0n1p2", "sda"))
    block(tmp_path, "sys/devices/virtual/block/dm-0", "254:0", below=("md0",))
    disks = gather(tmp_path, (254, 0))["disks"]
    assert disks == [DISK, {"name": "sda", "model": None, "rotational": True, "link": None}]


def test_a_mapping_on_itself_ends(tmp_path: Path) -> None:
    block(tmp_path, "sys/devices/virtual/block/dm-0", "254:0", below=("dm-0",))
    assert [disk["name"] for disk in gather(tmp_path, (254, 0))["disks"]] == ["dm-0"]


def test_a_link_that_runs_below_what_the_disk_can(tmp_path: Path) -> None:
    nvme(tmp_path, "8.0 GT/s PCIe", "2")
    (disk,) = gather(tmp_path, (259, 0))["disks"]
    assert disk["link"] == {"gts": 8.0, "lanes": 2, "best_gts": 16.0, "best_lanes": 4}


@pytest.mark.parametrize(("speed", "lanes"), [("Unknown", "4"), ("16.0 GT/s PCIe", "0"), ("16.0 GT/s PCIe", "x4")])
def test_a_link_that_tells_nothing(speed: str, lanes: str, tmp_path: Path) -> None:
    nvme(tmp_path, speed, lanes)
    (disk,) = gather(tmp_path, (259, 0))["disks"]
    assert disk["link"] is None


def test_a_directory_that_is_not_there_yet_is_on_its_parent_s_device(tmp_path: Path) -> None:
    assert _condition.device_of(str(tmp_path / "not/yet/there")) == _condition.device_of(str(tmp_path))
