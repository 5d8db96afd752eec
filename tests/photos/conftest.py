"""A small run whose groups are known: the page, the report and their tests work on it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from fastreid_uns.photos.members import Member
from fastreid_uns.photos.store import PhotoRun

HOSTILE = "<img src=x onerror=document.title='owned'>.png"
COLORS = {1: "#c0392b", 2: "#2471a3", 3: "#7d3c98", 4: "#229954"}
NAMES = {
    1: ["a1.png", "a2.png", "a3.png", "Ärger/a 4.png"],
    2: ["b1.png", "b2.png", HOSTILE],
    3: ["line\nbreak.png"],
    4: ["c,1.png", "c2.png"],
}


def draw(file: Path, color: str, number: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (96, 64) if number % 2 else (48, 96), color)
    ImageDraw.Draw(image).rectangle((4 + 6 * number, 8, 16 + 6 * number, 28), fill="white")
    image.save(file)


@pytest.fixture
def small_run(tmp_path) -> PhotoRun:
    """Ten photos in four groups; the later a photo in its group, the less certain; groups 1 and 2 are near."""
    photos, members = tmp_path / "my photos", []
    nearest = {1: 2, 2: 1, 3: 4, 4: 3}
    for group, names in NAMES.items():
        for place, name in enumerate(names):
            draw(photos / name, COLORS[group], place)
            members.append(Member(name, group, 0.9 - 0.2 * place, nearest[group], 0.6 - 0.1 * place))
    run = PhotoRun.create(tmp_path / "out", photos)
    run.write_groups(members)
    return run


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """Headless Chromium that finds no host but this computer; without one the tests are skipped."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    binary, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    switches = ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1400,950")
    for switch in (*switches, "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chromium = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield chromium
    chromium.quit()
