"""The studio's page in headless Chromium: `make test-browser` runs it, and leaves screenshots in build/studio."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.studio.streams import TOKENS, playing, recording_of
from vllm_dllm.policy_options import policy_names
from vllm_dllm.studio.serve import page_server

SHOTS = Path(__file__).parents[2] / "build/studio"
WIDE, NARROW = {"width": 1180, "height": 940}, {"width": 390, "height": 844}

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    SHOTS.mkdir(parents=True, exist_ok=True)
    path = os.environ.get("CHROMIUM") or "/usr/bin/chromium"
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium: Browser) -> Iterator[Open]:
    """Opens the page on a server that plays streams, or a file; fails on any error that the page makes."""
    errors: list[str] = []
    with ExitStack() as stack:

        def open_page(url: str | None = None, server: str | None = None, looks: Any = None, **plays: Any) -> Page:
            if url is None:
                origin = server or stack.enter_context(playing(**plays))[0]
                studio = stack.enter_context(page_server(origin, "127.0.0.1", 0))
                thread = threading.Thread(target=studio.serve_forever)
                thread.start()
                stack.callback(thread.join)
                stack.callback(studio.shutdown)
                url = f"http://127.0.0.1:{studio.server_port}/"
            page = chromium.new_page(**{"viewport": WIDE, **(looks or {})})
            stack.callback(page.close)
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
            page.goto(url)
            return page

        yield open_page
    refused = "Failed to load resource: the server responded with a status of"
    assert [error for error in errors if not error.startswith(refused)] == []


def run(page: Page, prompt: str = "Say it as JSON") -> None:
    """Send a prompt, and wait until both runs have ended."""
    expect(page.locator("#model option")).to_have_count(1)
    page.fill("#prompt", prompt)
    page.click("#go")
    expect(page.locator("#verdict strong").first).to_be_visible(timeout=20_000)


def numbers(page: Page, place: int) -> dict[str, str]:
    panel = page.locator("article").nth(place)
    return dict(zip(panel.locator("dt").all_inner_texts(), panel.locator("dd").all_inner_texts(), strict=True))


def cells(page: Page, place: int) -> list[str]:
    return page.locator("article").nth(place).locator(".cell:not(.masked)").all_inner_texts()


def test_a_prompt_is_denoised_with_drafts_and_without(opened: Open) -> None:
    page = opened(wait=partial(time.sleep, 0.02))
    run(page)
    expect(page.locator("#verdict")).to_contain_text("6 forwards instead of 10")
    expect(page.locator("#verdict")).to_contain_text("the same text")
    own = numbers(page, 0)
    assert {name: own[name] for name in ("forwards", "tokens", "drafts", "accepted", "wasted")} == {
        "forwards": "6", "tokens": "10", "drafts": "14", "accepted": "4", "wasted": "10"
    }  # fmt: skip
    assert (numbers(page, 1)["forwards"], numbers(page, 1)["wasted"]) == ("10", "0")
    for place, drafts in ((0, True), (1, False)):
        assert [text.strip() for text in cells(page, place)][-3:] == ["<b>emu</b>", "}", "∎"]
        page.locator("article summary").nth(place).click()
        body = json.loads(page.locator("pre.json").nth(place).inner_text())
        assert ("dllm_speculation" not in body["vllm_xargs"]) == drafts
        assert page.locator("pre.curl").nth(place).inner_text().startswith("curl -N 'http://127.0.0.1:")
    assert page.locator("#stage b").count() == 0, "what a server says is text"


def test_policies_are_proposed(opened: Open) -> None:
    assert opened().locator("#policies option").all_text_contents() == list(policy_names())


def test_it_is_shown_while_it_comes(opened: Open) -> None:
    page = opened(wait=partial(time.sleep, 0.3))
    page.fill("#prompt", "a")
    page.click("#go")
    expect(page.locator(".cell").first).to_have_text("{")
    assert page.locator(".cell.masked").count() > 0
    expect(page.locator("#go")).to_be_disabled()
    page.click("#stop")
    expect(page.locator("#status")).to_have_text("Stopped.")
    expect(page.locator("#go")).to_be_enabled()


def test_everything_is_reached_by_the_keyboard(opened: Open) -> None:
    page = opened()
    expect(page.locator("#model option")).to_have_count(1)
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#verdict strong").first).to_be_visible()
    page.focus("#place")
    page.keyboard.press("Home")
    assert cells(page, 0) == cells(page, 1) == []
    page.keyboard.press("ArrowRight")
    assert (len(cells(page, 0)), len(cells(page, 1))) == (2, 1)
    assert page.locator("#place").get_attribute("aria-valuetext") == "forward 1 of 10"
    page.focus("article .canvas")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".about").first).to_have_text(
        'position 1: "{", unmasked by forward 1, confidence > 99.9 %; next "other" 5.0 %'
    )
    page.keyboard.press("ArrowRight")
    expect(page.locator(".about").first).to_have_text("position 2: masked")
    page.focus("#forth")
    page.keyboard.press("Enter")
    assert len(cells(page, 0)) == 4
    page.focus("#play")
    page.keyboard.press("Space")
    expect(page.locator("#place")).to_have_value("10", timeout=10_000)
    expect(page.locator("#play")).to_have_text("Play")
    nameless = "[...document.querySelectorAll('input, select, textarea')].filter((each) => !each.labels.length).length"
    assert page.evaluate(f"() => {nameless}") == 0


def test_a_saved_recording_is_the_page_by_itself(opened: Open, tmp_path: Path) -> None:
    page = opened(wait=partial(time.sleep, 0.01))
    run(page, "</script><b>")
    with page.expect_download() as download:
        page.click("#save")
    path = tmp_path / "saved.html"
    download.value.save_as(path)
    recording = recording_of(path.read_text())
    assert recording["prompt"] == "</script><b>"
    assert [run["name"] for run in recording["runs"]] == ["With drafts", "Without drafts"]
    saved = opened(path.as_uri())
    asked: list[str] = []
    saved.on("request", lambda request: asked.append(request.url))
    expect(saved.locator("#where")).to_have_text("tiny: </script><b>")
    expect(saved.locator("#form")).to_be_hidden()
    assert saved.locator("#verdict").inner_text() == page.locator("#verdict").inner_text()
    assert [cells(saved, place) for place in (0, 1)] == [cells(page, place) for place in (0, 1)]
    saved.check("input[value=ms]")
    saved.focus("#place")
    saved.keyboard.press("Home")
    assert cells(saved, 0) == []
    with saved.expect_download() as download:
        saved.click("#save")
    download.value.save_as(tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == path.read_text()
    assert [url for url in asked if not url.startswith("blob:")] == []


def test_what_goes_wrong_is_said(opened: Open) -> None:
    page = opened(error="max_tokens is 0; allowed are whole numbers from 1")
    expect(page.locator("#model option")).to_have_count(1)
    page.click("#go")
    expect(page.locator("[role=alert]")).to_have_text("400: max_tokens is 0; allowed are whole numbers from 1")
    page.click("summary")
    page.fill("#more", "{'a'")
    page.click("#go")
    expect(page.locator("[role=alert]")).to_contain_text("“More fields” is not JSON")
    other = opened(is_ours=False)
    expect(other.locator("#model option")).to_have_count(1)
    other.click("#go")
    expect(other.locator("[role=alert]")).to_contain_text("tiny is no model that vllm-dllm serves")
    broken = opened(most=4)
    expect(broken.locator("#model option")).to_have_count(1)
    broken.click("#go")
    expect(broken.locator("[role=alert]")).to_contain_text("The stream broke off")
    assert len(cells(broken, 0)) == 4, "what came stays"
    alone = opened(server="http://127.0.0.1:1")
    expect(alone.locator("[role=alert]")).to_contain_text("http://127.0.0.1:1 does not answer")


def test_a_server_without_speculation_is_asked_once(opened: Open) -> None:
    page = opened(exactness=None)
    expect(page.locator("#model option")).to_have_count(1)
    page.click("#go")
    expect(page.locator("#verdict")).to_contain_text("no speculation")
    assert page.locator("article").count() == 1


CONTRASTS = """() => {
  const parse = (color) => (color.match(/[\\d.]+/g) || []).map(Number);
  const light = (color) => {
    const linear = (c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = parse(color).map((c) => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (; element; element = element.parentElement) {
      const color = getComputedStyle(element).backgroundColor;
      if (parse(color).length === 3 || parse(color)[3] > 0) return color;
    }
  };
  return [...document.querySelectorAll("body *")]
    .filter((each) => each.checkVisibility() && !each.disabled && !each.closest(".sr, .masked, option, svg")
      && [...each.childNodes].some((node) => node.nodeType === 3 && node.data.trim()))
    .map((each) => [light(getComputedStyle(each).color), light(ground(each)), each.outerHTML.slice(0, 80)])
    .map(([a, b, what]) => [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), what]);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["wide", "narrow"])
def test_it_can_be_read(opened: Open, scheme: str, size: str) -> None:
    looks = {"viewport": WIDE if size == "wide" else NARROW, "color_scheme": scheme, "reduced_motion": "reduce"}
    page = opened(looks=looks)
    run(page)
    for place in ("3", "10"):
        page.locator("#place").fill(place)
        page.screenshot(path=SHOTS / f"{size}-{scheme}-{place}.png", full_page=size == "narrow")
        contrasts = page.evaluate(CONTRASTS)
        assert len(contrasts) > 40
        assert [each for each in contrasts if each[0] < 4.5] == []
    assert page.evaluate("() => document.scrollingElement.scrollWidth <= innerWidth")
    assert page.evaluate("() => getComputedStyle(document.querySelector('.cell.new')).animationName") == "none"
    assert len(TOKENS) == page.locator("article").first.locator(".cell").count()
