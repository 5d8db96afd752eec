"""The report says what is known, leaves out what is not, holds every photo and works without a server."""

from __future__ import annotations

import html.parser
import os
import time
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from fastreid_uns.errors import InvalidValue
from fastreid_uns.photos.members import Member
from fastreid_uns.photos.report import PHOTOS_A_PAGE, project, write_report
from fastreid_uns.photos.store import PhotoRun
from fastreid_uns.photos.teller import duration
from fastreid_uns.utils.paths import printable

FEATURES = np.random.default_rng(0).normal(size=(10, 6))


class Reader(html.parser.HTMLParser):
    """Links, pictures, scripts that run, and the text of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links, self.pictures, self.text, self.tags = [], [], "", []
        self._quiet = False
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self._quiet = tag in ("script", "style")
        if tag == "a":
            self.links.append(values["href"])
        if tag == "img" and "src" in values:
            self.pictures.append(values["src"])
        assert not [name for name in values if name.startswith("on")]

    def handle_endtag(self, tag):
        self._quiet = False

    def handle_data(self, data):
        self.text += "" if self._quiet else data


def target(page: Path, address: str) -> Path:
    return page.parent / os.fsdecode(os.fsencode(unquote(address.partition("#")[0], errors="surrogateescape")))


def test_all_photos_are_there_with_names_links_and_pictures(small_run):
    page = write_report(small_run, FEATURES)
    read = Reader(page)
    assert page == small_run.folder / "report.html"
    for member in small_run.groups():
        assert printable(member.path) in page.read_text() or "&lt;img" in page.read_text()
        assert printable(member.path.rpartition("/")[2]) in read.text
    originals = [target(page, link).resolve() for link in read.links if "#" not in link]
    assert sorted(originals) == sorted(small_run.photo(member.path).resolve() for member in small_run.groups())
    assert len(read.pictures) == 10
    assert all(target(page, picture).is_file() for picture in read.pictures)


def test_the_first_line_says_how_good_the_groups_are(small_run):
    text = Reader(write_report(small_run)).text
    assert "unverified" in text
    assert f"fastreid-uns review {small_run.folder}" in text
    small_run.update(audit={"statement": "84 ± 9 of 100 pairs.", "verified": True, "advice": ""})
    text = Reader(write_report(small_run)).text
    assert "84 ± 9 of 100 pairs." in text
    assert "unverified" not in text
    advice = "Take <other> weights."
    small_run.update(audit={"statement": "20 ± 9 of 100 pairs.", "verified": True, "advice": advice})
    text = Reader(write_report(small_run)).text
    assert text.index(advice) < text.index("20 ± 9") < text.index("groups of two")


def test_groups_come_by_doubt_and_photos_that_are_alone_last(small_run):
    text = Reader(write_report(small_run)).text
    places = [text.index(f"Group {number} ") for number in (1, 2, 4, 3)]
    assert places == sorted(places)


def test_the_run_is_told_and_what_is_absent_is_left_out(small_run):
    assert "Settings" not in Reader(write_report(small_run)).text
    small_run.update(
        settings={"threshold": 0.85},
        weights={"name": "some net", "sha256": "abc"},
        seconds={"scan": 2.0, "train": 125.4},
        size=[128, 64],
        commit="1234567",
        scan={"unreadable": 3, "duplicates": 0},
    )
    text = " ".join(Reader(write_report(small_run)).text.split())
    for part in ("threshold 0.85", "some net", "abc", "128 x 64", "1234567", "2 min 5 s", "2 min 7 s", "unreadable 3"):
        assert part.replace(" ", "") in text.replace(" ", ""), part
    assert "duplicates" not in text


def test_many_photos_are_spread_over_pages_that_lead_to_each_other(tmp_path):
    run = PhotoRun.create(tmp_path / "out", tmp_path / "photos")
    count = 2 * PHOTOS_A_PAGE + 1
    members = [Member(f"{i}.jpg", i // 50 + 1, 1 - i / count, (i // 50 + 1) % 20 + 1, 0.5) for i in range(count)]
    run.write_groups(members)
    first = write_report(run)
    others = sorted(run.folder.glob("report/groups-*.html"))
    pages = [first, *others]
    assert len(pages) == 3
    assert sum(len(Reader(page).pictures) for page in pages) == count
    for page in pages:
        for link in Reader(page).links:
            if link.endswith(".html") or "html#" in link:
                assert target(page, link).is_file()
                anchor = link.partition("#")[2]
                assert not anchor or f'id="{anchor}"' in target(page, link).read_text()
    run.write_groups(members[:40])
    write_report(run)
    assert list(run.folder.glob("report/groups-*.html")) == []


def test_hostile_names_stay_text(small_run):
    small_run.update(settings={"</script><script>alert(1)</script>": "<b>"}, audit=None)
    page = write_report(small_run, FEATURES)
    read = Reader(page)
    assert "<img src=x onerror" in read.text
    assert read.tags.count("script") == 3  # two of data, one of ours
    assert "b" not in read.tags
    assert "://" not in page.read_text()


def test_photos_that_are_gone_do_not_stop_it(small_run):
    small_run.photo("a1.png").unlink()
    assert len(Reader(write_report(small_run)).pictures) == 10


@pytest.mark.parametrize("count", [0, 1, 3])
def test_few_photos(tmp_path, count):
    run = PhotoRun.create(tmp_path / "out", tmp_path)
    run.write_groups([Member(f"{i}.jpg", i + 1, 0.5) for i in range(count)])
    read = Reader(write_report(run, np.ones((count, 2))))
    assert len(read.pictures) == count
    assert f"photos{count}" in "".join(read.text.split())


def test_features_must_be_those_of_the_photos(small_run):
    with pytest.raises(InvalidValue, match="9 features and 10 photos"):
        write_report(small_run, FEATURES[:9])


@pytest.mark.parametrize("shape", [(1, 8), (2, 8), (3, 1), (9, 2), (12, 5), (40, 60)])
def test_a_map_of_any_number_of_photos(shape):
    features = np.random.default_rng(0).normal(size=shape)
    places = project(features)
    assert places.shape == (shape[0], 2)
    assert ((places >= 0) & (places <= 1)).all()
    assert np.array_equal(places, project(features))


def test_photos_that_are_equal_are_one_place():
    assert np.array_equal(project(np.ones((5, 4))), np.full((5, 2), 0.5))


def test_the_map_keeps_groups_together():
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(4, 16))
    group = np.repeat(np.arange(4), 15)
    places = project(centers[group] + 0.05 * rng.normal(size=(60, 16)))
    distance = np.linalg.norm(places[:, None] - places[None], axis=2) + 9 * np.eye(60)
    assert (group[distance.argmin(axis=1)] == group).all()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (48.2, "48 s"), (59.7, "1 min 0 s"), (185, "3 min 5 s"), (7620, "2 h 7 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_report_in_a_browser_without_a_server(browser, small_run):
    page = write_report(small_run, FEATURES)
    browser.get_log("browser")
    browser.get(page.as_uri())
    run = browser.execute_script
    loaded = "return [...document.querySelectorAll('article img')].map((image) => [image.complete, image.naturalWidth])"
    browser.execute_script("for (const image of document.images) image.loading = 'eager'")
    wait_for(lambda: all(done and width for done, width in run(loaded)))
    assert run("return getComputedStyle(document.querySelector('article img')).objectFit") == "contain"
    place = run(
        "const data = JSON.parse(document.getElementById('map-data').textContent);"
        "const box = document.querySelector('canvas').getBoundingClientRect();"
        "const x = data.x[4] / 9999, y = data.y[4] / 9999;"
        "return [box.left + 24 + x * (box.width - 48), box.top + 24 + y * (box.height - 48)]"
    )
    from selenium.webdriver import ActionChains  # after the fixture, which skips without it

    mouse = ActionChains(browser)
    mouse.w3c_actions.pointer_action.move_to_location(*map(round, place))
    mouse.perform()
    wait_for(lambda: "Group 2: b1.png" in run("return document.getElementById('tip').textContent"))
    wait_for(lambda: run("return document.querySelector('#tip img').naturalWidth") > 0)
    mouse.click().perform()
    wait_for(lambda: browser.current_url.endswith("#group-2"))
    assert [entry["message"] for entry in browser.get_log("browser")] == []
    assert "owned" not in browser.title


def wait_for(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
