"""The review page in a real browser: answer, merge, split, undo, reload, two windows, hostile names."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

pytest.importorskip("starlette", reason="needs the extra `review`")

from fastreid_uns.photos.decisions import Decisions
from fastreid_uns.photos.review import Review
from fastreid_uns.photos.server import Server

PATIENCE = 20  # seconds; the machine may be busy


class Page:
    """What a person does with the page."""

    def __init__(self, browser, address: str) -> None:
        self.browser, self.address = browser, address

    def open(self, view: str) -> None:
        self.browser.get("about:blank")
        self.browser.get(f"{self.address}#{view}")
        self.wait(lambda: self.find("#facts").text != "")

    def find(self, selector: str):
        found = self.browser.find_elements("css selector", selector)
        assert found, f"{selector} is not on the page: {self.browser.find_element('css selector', 'body').text}"
        return found[0]

    def count(self, selector: str) -> int:
        return len(self.browser.find_elements("css selector", selector))

    def click(self, selector: str) -> None:
        """Scroll to an element and click it; again if the page was drawn anew in between."""
        from selenium.common.exceptions import WebDriverException

        def clicked() -> bool:
            try:
                self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", self.find(selector))
                self.find(selector).click()
            except (WebDriverException, AssertionError):
                return False
            return True

        self.settle()
        self.wait(clicked)

    def press(self, key: str) -> None:
        self.settle()
        self.find("body").send_keys(key)

    def settle(self) -> None:
        """Wait until the page has drawn what was decided; until then it ignores keys and clicks."""
        self.wait(lambda: self.browser.execute_script("return document.querySelector('main').ariaBusy") == "false")

    def text(self, selector: str = "main") -> str:
        return self.browser.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", selector)

    def sides(self) -> list[str]:
        script = "return [...document.querySelectorAll('.side')].map((side) => side.dataset.photo)"
        return self.browser.execute_script(script)

    def wait(self, condition) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, self.text("body")
            time.sleep(0.05)


@pytest.fixture
def decisions(small_run) -> Decisions:
    return Decisions(small_run.folder / "decisions.csv")


@pytest.fixture
def page(browser, small_run) -> Iterator[Page]:
    server = Server(Review(small_run))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    browser.get_log("browser")  # of the test before
    yield Page(browser, server.address)
    problems = [entry["message"] for entry in browser.get_log("browser")]
    browser.get("about:blank")
    server.stop()
    thread.join(PATIENCE)
    assert [text for text in problems if "409 (Conflict)" not in text] == []


def answers(decisions: Decisions) -> list[tuple]:
    return [(row.kind, row.answer) for row in decisions.active()]


def test_answer_by_button_and_key_then_undo(page, decisions):
    page.open("questions")
    page.wait(lambda: len(page.sides()) == 2)
    first = page.sides()
    page.click("[data-answer=different]")
    page.wait(lambda: page.sides() not in ([], first))
    second = page.sides()
    row = decisions.active()[0]
    assert ([*row.first, *row.second], row.answer) == (first, "different")
    for key in "us":
        before = page.sides()
        page.press(key)
        page.wait(lambda before=before: page.sides() != before)
    assert answers(decisions) == [("pair", "different"), ("pair", "unsure"), ("pair", "same")]
    page.press("z")
    page.wait(lambda: len(decisions.active()) == 2)
    page.click("#undo")
    page.wait(lambda: page.sides() == second)
    assert answers(decisions) == [("pair", "different")]


def test_all_questions_answered_names_the_next_command(page, decisions):
    page.open("questions")
    page.wait(page.sides)
    while sides := page.sides():
        page.press("u")
        page.wait(lambda sides=sides: page.sides() != sides)
    assert "No question is left" in page.text()
    assert "fastreid-uns group" in page.text("code")
    assert "--resume" in page.text("code")


def test_merge_two_groups_from_the_list(page, decisions):
    page.open("groups")
    page.wait(lambda: page.count(".card") == 4)
    assert not page.find("#merge").is_enabled()
    for number in (1, 2):
        page.click(f"[aria-label='Choose group {number}']")
    page.click("#merge")
    page.wait(lambda: page.count(".card") == 3)
    assert "7 photos" in page.text("[data-group='1']")
    assert answers(decisions) == [("merge", "")]
    page.press("z")
    page.wait(lambda: page.count(".card") == 4)
    assert answers(decisions) == []


def test_merge_with_the_nearest_and_by_number(page, decisions):
    page.open("group/3")
    page.click("[data-merge='4']")
    page.wait(lambda: page.count(".member") == 3)
    assert page.text("h2") == "Group 4"  # the larger one gave the number
    page.find("input[type=number]").send_keys("2\n")
    page.wait(lambda: page.count(".member") == 6)
    assert answers(decisions) == [("merge", ""), ("merge", "")]


def test_split_off_and_undo_and_reload(page, decisions):
    page.open("group/1")
    page.wait(lambda: page.count(".member") == 4)
    page.click("[data-photo='a2.png'] .pickable")
    page.click("#split")
    page.wait(lambda: page.count(".member") == 3)
    assert decisions.active()[0].first == ("a2.png",)
    assert page.text("#message") == "Split off from group 1 as group 5."
    page.browser.refresh()
    page.wait(lambda: page.count(".member") == 3)
    page.open("group/5")
    page.wait(lambda: page.count("[data-photo='a2.png']") == 1)
    page.open("answers")
    page.click("[data-row='1'] button")
    page.wait(lambda: "Nothing is decided yet" in page.text())
    page.open("group/1")
    page.wait(lambda: page.count(".member") == 4)


def test_split_off_one_by_one(page, decisions):
    page.open("group/1")
    for name in ("a1.png", "a2.png"):
        page.click(f"[data-photo='{name}'] .pickable")
    page.click("#split-each")
    page.wait(lambda: page.count(".member") == 2)
    page.open("groups?order=number")
    page.wait(lambda: page.count(".card") == 6)
    assert page.count(".card") == 6


def test_two_windows(page, decisions):
    browser = page.browser
    here = browser.current_window_handle
    page.open("group/1")
    page.click("[data-photo='a2.png'] .pickable")
    browser.switch_to.new_window("window")
    there = browser.current_window_handle
    page.open("group/1")
    page.click("[data-photo='a3.png'] .pickable")
    page.click("#split")
    page.wait(lambda: page.count(".member") == 3)
    browser.switch_to.window(here)
    page.click("#split")  # this window still shows four photos
    page.wait(lambda: page.count(".member") == 3)
    assert "another window" in page.text("#message")
    assert len(decisions.active()) == 1
    page.click("[data-photo='a2.png'] .pickable")
    page.click("#split")
    page.wait(lambda: page.count(".member") == 2)
    browser.switch_to.window(there)
    page.wait(lambda: page.count(".member") == 2)  # it notices by itself
    browser.close()
    browser.switch_to.window(here)


def test_a_contradiction_is_shown_and_can_be_mended(page, decisions):
    page.open("groups")
    page.wait(lambda: page.count(".card") == 4)
    earlier = decisions.pair("a1.png", "b1.png", "different")
    for number in (1, 2):
        page.click(f"[aria-label='Choose group {number}']")
    page.click("#merge")
    page.wait(lambda: "contradicts" in page.text("#message"))
    assert earlier.time in page.text("#message")
    page.click("#message button")
    page.wait(lambda: answers(decisions) == [])


def test_hostile_names_stay_text_and_pictures_keep_their_aspect(page):
    page.open("group/2")
    page.wait(lambda: page.count(".member") == 3)
    page.wait(lambda: page.browser.execute_script("return [...document.images].every((image) => image.complete)"))
    assert "<img src=x onerror" in page.text()
    assert "owned" not in page.browser.title
    sizes = (
        "return [...document.querySelectorAll('.member img')].map((image) => [image.naturalWidth, image.naturalHeight])"
    )
    assert sorted(map(tuple, page.browser.execute_script(sizes))) == [(48, 96), (48, 96), (96, 64)]
    fit = "return getComputedStyle(document.querySelector('.member img')).objectFit"
    assert page.browser.execute_script(fit) == "contain"


def test_the_page_asks_no_other_host(page):
    for view in ("questions", "groups", "group/1", "answers"):
        page.open(view)
    page.wait(lambda: "Nothing is decided" in page.text())
    loaded = page.browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert loaded
    assert all(address.startswith(page.address) for address in loaded)
