# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The fleet report in a real browser: what a reader sees, and that the page asks for nothing but itself.

`make report-picture` keeps the pictures in docs/.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from ansible_collections.cpullm.epyc.plugins.plugin_utils import _report
from playwright.sync_api import Browser, Page, sync_playwright

from tests.unit import fleet_builder

NAMES = ("epyc-01", "epyc-02", "epyc-03")
HOSTILE = "<script>document.title = 'run'</script><img src=http://192.0.2.1/x onerror=alert(1)>"


@dataclass
class Seen:
    """What a page said and asked for while it was open."""

    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium")
    assert program, "found no chromium, expected the Debian package of requirements/apt.txt: make setup"
    # The sandbox needs another user than root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the address of the report of three hosts with one kind of fault each."""
    folder = tmp_path_factory.mktemp("fleet")
    page = _report.render(_report.hosts(fleet_builder.fleet(folder)), "2026-11-24 05:00 UTC")
    (folder / "report.html").write_text(page, encoding="utf-8")
    return (folder / "report.html").as_uri()


def visit(browser: Browser, address: str, width: int = 1280, scheme: str = "light") -> tuple[Page, Seen]:
    """Return an open page, and what it says and asks for from then on."""
    seen = Seen()
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
    page.on("request", lambda request: seen.requests.append(request.url))
    page.on("console", lambda message: seen.errors.append(message.text))
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    page.on("dialog", lambda dialog: (seen.errors.append("a dialog"), dialog.dismiss()))
    page.goto(address, wait_until="networkidle")
    return page, seen


def row(page: Page, name: str) -> str:
    """Return what a host's row in the table shows."""
    return page.locator(".fleet tbody tr", has=page.get_by_role("link", name=name, exact=True)).inner_text()


def colour(page: Page, selector: str, what: str) -> str:
    return str(page.locator(selector).first.evaluate(f"element => getComputedStyle(element).{what}"))


def test_each_row_says_what_the_machine_is_and_what_to_change_first(browser: Browser, report: str) -> None:
    page, seen = visit(browser, report)
    assert page.locator(".fleet tbody tr").count() == 3
    for name, state, first, way_out in zip(
        NAMES,
        ("SERVING", "NOT SERVING: reboot required", "REFUSED"),
        ("11 of 12 channels populated, empty: DIMM_P0_I0", "pages of 1 GiB are configured", "384.00 GiB on socket 0"),
        ("Add equal modules", "grub_hugepages_reboot_allowed=true", "Take a smaller model"),
    ):
        text = row(page, name)
        for part in (state, first, way_out):
            assert part in text, f"{name}: {text!r}"
    assert "668 / 668" in row(page, "epyc-01")
    assert "0 / 1336" in row(page, "epyc-02")
    assert (seen.errors, seen.requests) == ([], [report])


def test_each_host_has_its_findings_and_pictures(browser: Browser, report: str) -> None:
    page, _seen = visit(browser, report)
    page.get_by_role("link", name="epyc-02", exact=True).click()
    section = page.locator("section", has=page.get_by_role("heading", name="epyc-02"))
    assert "4800 MT/s configured, modules rated for 6400 MT/s" in section.inner_text()
    assert section.locator(".dimm.slow").count() == 12
    assert section.locator(".dimm.good").count() == 12
    assert section.get_by_role("img", name="Memory slots of socket 0: 12 slow").is_visible()
    assert section.get_by_role("img", name="Memory of sockets 0 and 1, each").is_visible()
    first = page.locator("section", has=page.get_by_role("heading", name="epyc-01"))
    assert first.locator(".dimm.empty").get_attribute("title") == "DIMM_P0_I0: empty"
    refused = page.locator("section", has=page.get_by_role("heading", name="epyc-03")).inner_text()
    assert "at least 681.88 GiB on each socket" in refused


def test_a_benchmark_is_a_table_and_points_under_the_roofs(browser: Browser, report: str) -> None:
    page, _seen = visit(browser, report)
    section = page.locator("section", has=page.get_by_role("heading", name="epyc-01"))
    assert section.get_by_role("heading", name="Benchmark of 2026-11-25T19:00:00Z").is_visible()
    cells = section.locator("table.benchmark tr", has_text="decode_d4096").locator("td").all_inner_texts()
    assert cells == ["decode_d4096 tokens/s", "6.07", "6.02 to 6.11", "3 of 3", "91%"]
    assert "no run of batch_4 counts: the machine swapped 3 pages" in section.inner_text()
    # Three points, each between the axis and the roof that was measured.
    points = section.locator("svg [id$='benchmark-0'] use")
    assert points.count() == 3
    heights = [points.nth(number).bounding_box()["y"] for number in range(3)]  # type: ignore[index]
    assert heights == sorted(heights)
    line = section.locator("svg [id$='benchmark-0'] path").first
    assert line.evaluate("element => getComputedStyle(element).stroke") == colour(
        page, ".key.benchmark", "borderTopColor"
    )


def test_every_picture_has_a_name_and_ids_of_its_own(browser: Browser, report: str) -> None:
    page, _seen = visit(browser, report)
    pictures = page.locator("svg")
    assert pictures.count() == 3
    labels = [pictures.nth(number).get_attribute("aria-label") for number in range(3)]
    assert labels == [pictures.nth(number).locator("title").text_content() for number in range(3)]
    assert len(set(labels)) == 2, labels
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(element => element.id)")
    assert len(ids) == len(set(ids))
    uses = page.evaluate("[...document.querySelectorAll('use')].map(use => use.getAttribute('href').slice(1))")
    assert uses
    assert set(uses) <= set(ids)
    # Text stays text: it can be selected, searched, and read aloud.
    assert "tokens of context" in page.locator("svg").first.text_content()


def test_dark_and_light_differ_and_paper_is_white(browser: Browser, report: str) -> None:
    looks = {}
    for scheme in ("light", "dark"):
        page, _seen = visit(browser, report, scheme=scheme)
        looks[scheme] = [
            colour(page, "body", "backgroundColor"),
            colour(page, "body", "color"),
            colour(page, "svg text", "fill"),
            colour(page, "svg path[style*='stroke: var(--roof-1)']", "stroke"),
        ]
    for light, dark in zip(*looks.values()):
        assert light != dark
    page.emulate_media(media="print", color_scheme="dark")
    assert colour(page, "body", "backgroundColor") == "rgb(255, 255, 255)"
    assert page.pdf(format="A4").startswith(b"%PDF-")


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_its_window(width: int, scheme: str, browser: Browser, report: str, tmp_path: Path) -> None:
    page, _seen = visit(browser, report, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wide = page.evaluate(
        "width => [...document.querySelectorAll('body *')]"
        ".filter(element => element.getBoundingClientRect().right > width + 1).map(element => element.outerHTML)",
        width,
    )
    assert wide == []
    pictures = Path(os.environ.get("CPULLM_REPORT_PICTURES") or tmp_path)
    picture = pictures / f"report-{scheme}-{width}.png"
    page.screenshot(path=picture, full_page=True)
    assert picture.stat().st_size > 10_000


def test_what_a_host_says_runs_nothing_and_asks_for_nothing(browser: Browser, tmp_path: Path) -> None:
    host = fleet_builder.one_channel_short(tmp_path / "tree")
    for slot in host["ansible_facts"]["cpullm_dimm"]["slots"]:
        slot.update(part_number=HOSTILE, locator=HOSTILE)
    hosts = [{**host, "inventory_hostname": HOSTILE}, {"inventory_hostname": "x", "__report_reached": {"failed": True}}]
    hosts[1]["__report_reached"]["msg"] = HOSTILE * 50
    path = tmp_path / "hostile.html"
    path.write_text(_report.render(_report.hosts(hosts), "now"), encoding="utf-8")
    for width in (1280, 390):
        page, seen = visit(browser, path.as_uri(), width)
        assert (seen.errors, seen.requests) == ([], [path.as_uri()])
        assert page.title() == "Fleet report: 2 host(s)"
        assert page.locator("script, img:not(svg)").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert HOSTILE in page.locator("h2").first.inner_text()
