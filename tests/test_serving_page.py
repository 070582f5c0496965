"""The page of `piflux serve`, in headless Chromium, before an engine without ranks."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from fake_engine import MODEL, FakeEngine, picture
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright
from servers import PATIENCE_S, served, until

from piflux.serving import Keys, build_app
from piflux.serving.jobs import Refused

CHROMIUM = shutil.which("chromium")
PHONE, DESK = {"width": 420, "height": 860}, {"width": 1300, "height": 860}

expect.set_options(timeout=1e3 * PATIENCE_S)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Debian's package chromium is not there")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"], timeout=1e3 * PATIENCE_S
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def serving() -> Iterator[tuple[str, FakeEngine]]:
    engine = FakeEngine()
    with served(build_app(engine)) as url:
        yield url, engine


@pytest.fixture
def engine(serving: tuple[str, FakeEngine]) -> FakeEngine:
    """The server's, as new."""
    serving[1].__init__(step_s=0.02)  # type: ignore[misc]
    return serving[1]


@pytest.fixture
def page(serving: tuple[str, FakeEngine], engine: FakeEngine, browser: Browser) -> Iterator[Page]:
    yield from opened(browser, serving[0])


def opened(browser: Browser, url: str, size: Any = DESK, **options: Any) -> Iterator[Page]:
    """A page that has nothing to complain of in the end."""
    page = browser.new_page(viewport=size, **options)
    page.set_default_timeout(1e3 * PATIENCE_S)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda x: wrong.append(x.text) if "Content Security" in x.text else None)
    page.goto(url)
    yield page
    page.close()
    assert wrong == []


def pixels_of(page: Page, id: str) -> bytes:
    """The picture in an element, as it was sent."""
    source = page.evaluate("id => document.getElementById(id).src", id)
    return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).tobytes()


def test_a_picture_by_keyboard_alone(page: Page, engine: FakeEngine) -> None:
    """The prompt has the focus; Enter draws; what was used is told."""
    expect(page.locator("#draw")).to_be_enabled()
    expect(page.locator("#prompt")).to_be_focused()
    expect(page.locator("#prompt")).to_have_value(MODEL.example)
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("a red apple")
    page.keyboard.press("Tab")  # to the qualities, as one
    page.keyboard.press("ArrowRight")
    expect(page.locator("#promise")).to_have_text(MODEL.promises["high"])
    for _ in range(3):  # the other quality, the size, the seed
        page.keyboard.press("Tab")
    page.keyboard.type("11")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("Done.")
    assert pixels_of(page, "first") == picture(11, (64, 64), "high").tobytes()
    expect(page.locator("#first")).to_have_attribute("alt", "a red apple")
    expect(page.locator("#facts")).to_contain_text("2 ranks, rotate, 3 of 4 steps computed")
    expect(page.locator("#slider")).to_be_hidden()
    (job,) = engine.seen
    assert (job.prompt, job.quality, job.seeds) == ("a red apple", "high", (11,))


def test_previews_and_progress_come_before_the_picture(page: Page, engine: FakeEngine) -> None:
    engine.held_at = 1
    page.locator("#draw").click()
    expect(page.locator("#status")).to_have_text("Step 1 of 4")
    expect(page.locator("#first.early")).to_be_visible()
    assert 0 < page.locator("#progress").evaluate("x => x.value") < 1
    expect(page.locator("#draw")).to_have_text("Stop")
    engine.held_at = None
    expect(page.locator("#status")).to_have_text("Done.")
    expect(page.locator("#first")).not_to_have_class("early")
    expect(page.locator("#progress")).to_be_hidden()


def test_two_qualities_meet_at_a_slider(page: Page, engine: FakeEngine) -> None:
    page.locator("#other").select_option("low")
    page.locator("#draw").click()
    expect(page.locator("#status")).to_have_text("Done.")
    first, second = engine.seen
    assert (first.quality, second.quality) == ("lossless", "low")
    assert first.seeds == second.seeds
    (seed,) = first.seeds
    assert pixels_of(page, "first") == picture(seed, (64, 64)).tobytes()
    assert pixels_of(page, "second") == picture(seed, (64, 64), "low").tobytes()
    expect(page.locator("#left")).to_contain_text("Lossless")
    expect(page.locator("#right")).to_contain_text("Low")
    clip = "x => getComputedStyle(x).clipPath"
    assert page.locator("#second").evaluate(clip) == "inset(0px 0px 0px 50%)"
    page.locator("#slider").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert page.locator("#second").evaluate(clip) == "inset(0px 0px 0px 53%)"
    page.locator("#again").click()
    expect(page.locator("#seed")).to_have_value(str(seed))


def test_a_seed_of_64_bits_stays_whole(page: Page, engine: FakeEngine) -> None:
    page.locator("#seed").fill(str(2**64 - 1))
    page.locator("#size").select_option(index=1)
    page.locator("#draw").click()
    expect(page.locator("#status")).to_have_text("Done.")
    assert engine.seen[0].seeds == (2**64 - 1,)
    assert engine.seen[0].size == (80, 48)


def test_stop_ends_the_job(page: Page, engine: FakeEngine) -> None:
    engine.held_at = 0
    page.locator("#draw").click()
    expect(page.locator("#draw")).to_have_text("Stop")
    expect(page.locator("#status")).to_have_text("Begins.")
    page.locator("#draw").click()
    expect(page.locator("#status")).to_have_text("Stopped.")
    expect(page.locator("#draw")).to_have_text("Draw")
    until(lambda: engine.cancelled)
    assert engine.cancelled == [engine.seen[0].id]


def test_what_fails_is_told(page: Page, engine: FakeEngine) -> None:
    engine.room = 0
    page.locator("#draw").click()
    expect(page.locator("#status.bad")).to_have_text(
        "the queue is full: ask later Try again in 4 s."
    )
    engine.room, engine.fails = 8, Refused(500, "lost_twice", "it has killed its ranks twice")
    page.locator("#draw").click()
    expect(page.locator("#status.bad")).to_have_text("it has killed its ranks twice")
    expect(page.locator("#draw")).to_be_enabled()


def test_it_waits_until_the_server_is_warm(
    browser: Browser, serving: tuple[str, FakeEngine], engine: FakeEngine
) -> None:
    engine.phase, engine.model = "starting", None
    for page in opened(browser, serving[0]):
        expect(page.locator("#status")).to_have_text("The server loads its model and warms up.")
        expect(page.locator("#draw")).to_be_disabled()
        engine.phase, engine.model = "ready", MODEL
        expect(page.locator("#draw")).to_be_enabled()


def test_it_asks_for_a_key(browser: Browser) -> None:
    key = "a-key-that-nobody-guesses"
    with served(build_app(FakeEngine(), keys=Keys([key]))) as url:
        for page in opened(browser, url):
            expect(page.locator("#status.bad")).to_have_text("This server wants an API key.")
            page.locator("#key").fill(key)
            page.keyboard.press("Tab")
            expect(page.locator("#draw")).to_be_enabled()
            page.locator("#draw").click()
            expect(page.locator("#status")).to_have_text("Done.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_cut_off(
    browser: Browser, serving: tuple[str, FakeEngine], engine: FakeEngine, scheme: Any
) -> None:
    for page in opened(browser, serving[0], PHONE, color_scheme=scheme):
        page.locator("#other").select_option("low")
        page.locator("#draw").click()
        expect(page.locator("#first")).to_be_in_viewport()
        expect(page.locator("#status")).to_have_text("Done.")
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width == PHONE["width"]
        back = page.evaluate("getComputedStyle(document.body).backgroundColor")
        light = sum(int(x) for x in back.removeprefix("rgb(").rstrip(")").split(",")) / 3
        assert light > 200 if scheme == "light" else light < 60
        for box in page.locator("button:visible, select:visible, #prompt, #save").all():
            bounds = box.bounding_box()
            assert bounds is not None and bounds["height"] >= 40  # of a finger
