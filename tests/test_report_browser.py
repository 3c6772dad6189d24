"""The report in a browser, headless Chromium: what it runs, shows, filters and sorts, on a screen and on a phone.

The documentation's screenshots are made by the same means, of a short training; `make screenshots` makes them anew.
"""

import importlib.util
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gallery_makers import drawn_run, trained_run
from PIL import Image

from farnear.report.page import write_report
from farnear.run_folder import RunFolder

MISSING = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
MISSING += [] if importlib.util.find_spec("selenium") else ["selenium"]
RIGHT, WRONG = "\N{CHECK MARK}", "\N{MULTIPLICATION SIGN}"
PHONE = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
SCREEN = {"width": 1100, "height": 900, "deviceScaleFactor": 1, "mobile": False}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if MISSING:
        reason = f"{', '.join(MISSING)} not found: the report goes untested in a browser (Debian: chromium-driver)"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    # As root it refuses its sandbox, and in a container there is little shared memory.
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_script_timeout(20)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(drawn_run(tmp_path_factory.mktemp("drawn")))


def opened(browser: Any, report: Path, device: dict[str, Any] = SCREEN, scheme: str = "light") -> None:
    """Open the page anew, as a device shows it."""
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    browser.get(report.as_uri())


def texts(browser: Any, selector: str) -> list[str]:
    """Of the elements that are visible."""
    visible = "[...document.querySelectorAll(arguments[0])].filter((one) => one.checkVisibility())"
    found: list[str] = browser.execute_script(f"return {visible}.map((one) => one.innerText)", selector)
    return [" ".join(text.split()) for text in found]


def shown(browser: Any) -> list[str]:
    return texts(browser, "#queries > li h3")


def choose(browser: Any, order: str) -> None:
    browser.find_element("css selector", f'#controls option[value="{order}"]').click()


def press(browser: Any, tag: str) -> None:
    browser.find_element("css selector", f'#controls button[data-tag="{tag}"]').click()


def moves(browser: Any) -> list[tuple[int, int]]:
    """Ranks before and after of the queries that are shown, in their order."""
    pairs = [move.removeprefix("rank ").split(" → ") for move in texts(browser, "#queries .move")]
    return [(int(before), int(after)) for before, after in pairs]


def test_the_page_runs_its_own_script_and_asks_for_nothing(browser: Any, report: Path) -> None:
    browser.get_log("performance")
    opened(browser, report)
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert report.as_uri() in asked
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}
    assert [url for url in asked if url.startswith("file")] == [report.as_uri()]
    assert browser.get_log("browser") == [], "no error, and nothing that the policy had to refuse"
    assert browser.find_element("id", "controls").is_displayed()
    # The policy is one that refuses: what the page does not bring is not run, not loaded and not sent.
    for word in (
        "fetch('http://127.0.0.1:9/')",
        "document.head.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = true'}))",
        "new Image().src = 'http://127.0.0.1:9/x.png'",
    ):
        browser.execute_script(f"{word}")
    refused = [entry["message"] for entry in browser.get_log("browser")]
    assert len(refused) >= 3 and all("Content Security Policy" in line or "fetch" in line for line in refused)
    assert browser.execute_script("return window.ran") is None


def test_the_pictures_are_there_once_and_whole(browser: Any, report: Path) -> None:
    opened(browser, report)
    sizes = browser.execute_async_script(
        """
        const done = arguments[0];
        const urls = [...document.querySelectorAll("#queries .thumb")].map(
            (thumb) => getComputedStyle(thumb).backgroundImage.slice(5, -2));
        Promise.all([...new Set(urls)].map(async (url) => {
            const image = new Image();
            image.src = url;
            await image.decode();
            return [image.naturalWidth, image.naturalHeight];
        })).then((sizes) => done({sizes: sizes, shown: urls.length}), (error) => done(String(error)));
        """
    )
    assert sizes["shown"] > 2 * len(sizes["sizes"]) > 60, "each is shown several times"
    assert all(size == [128, 160] for size in sizes["sizes"])
    assert report.read_text().count("data:image/jpeg;base64,") == len(sizes["sizes"])
    assert report.stat().st_size < 1_000_000
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('#queries .thumb')].map((one) => [one.offsetWidth, one.offsetHeight])"
    )
    assert all(abs(width / height - 128 / 160) < 0.03 and width > 50 for width, height in boxes)


def test_the_search_filters_as_one_types(browser: Any, report: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    opened(browser, report)
    everything = shown(browser)
    assert len(everything) == 60
    assert texts(browser, "#count") == ["60 of 60 queries"]
    field = browser.find_element("css selector", "#controls input")
    field.send_keys("TABLE 2019")
    found = [query for query in everything if "table" in query and "2019" in query]
    assert 0 < len(found) < 20
    assert shown(browser) == found
    assert texts(browser, "#count") == [f"{len(found)} of 60 queries"]
    field.send_keys("x")
    assert shown(browser) == [] and texts(browser, "#count") == ["0 of 60 queries"]
    field.send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.DELETE)
    assert shown(browser) == everything


def test_buttons_and_orders(browser: Any, report: Path) -> None:
    opened(browser, report)
    labels = dict(button.rsplit(" ", 1) for button in texts(browser, "#controls button"))
    assert labels.keys() == {"All", "Better", "Worse", "Still wrong"}
    gains = [1 / after - 1 / before for before, after in moves(browser)]
    assert gains == sorted(gains, reverse=True) and gains[0] > 0 > gains[-1]
    choose(browser, "loss")
    assert [1 / after - 1 / before for before, after in moves(browser)] == pytest.approx(sorted(gains))
    choose(browser, "now")
    ranks = [after for _, after in moves(browser)]
    assert ranks == sorted(ranks, reverse=True) and ranks[0] > ranks[-1] == 1
    choose(browser, "words")
    assert shown(browser) == sorted(shown(browser), key=str.lower)
    for tag, label, holds in (
        ("better", "Better", lambda before, after: after < before),
        ("worse", "Worse", lambda before, after: after > before),
        ("wrong", "Still wrong", lambda before, after: after != 1 and before != 1),
    ):
        press(browser, tag)
        assert moves(browser) and all(holds(*move) for move in moves(browser))
        assert texts(browser, "#count") == [f"{labels[label]} of 60 queries"]
        pressed = browser.find_elements("css selector", '#controls button[aria-pressed="true"]')
        assert [button.get_attribute("data-tag") for button in pressed] == [tag]
    press(browser, "")
    assert len(shown(browser)) == 60


def test_right_and_wrong_are_told_without_colours(browser: Any, report: Path) -> None:
    opened(browser, report)
    cards = browser.find_elements("css selector", "#queries > li")[:12]
    for card in cards:
        rights = card.find_elements("css selector", ".right")
        assert rights, "the right page is there, among the first ones or beside them"
        assert all(RIGHT in one.text and WRONG not in one.text for one in rights)
        assert all(WRONG in one.text for one in card.find_elements("css selector", ".wrong"))
        # What it says to those who see nothing.
        for one in rights:
            assert "right page" in one.find_element("tag name", "button").accessible_name
    rows = [row.text for row in cards[0].find_elements("css selector", "h4")]
    assert rows[:2] == ["before training", "after training"]


def test_a_thumbnail_is_enlarged_by_the_keyboard(browser: Any, report: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    opened(browser, report)
    button = browser.find_element("css selector", "#queries .pages button")
    small = button.find_element("css selector", ".thumb").size["width"]
    button.send_keys(Keys.ENTER)
    (large,) = [one for one in browser.find_elements("css selector", "[popover]") if one.is_displayed()]
    assert large.find_element("css selector", ".thumb").size["width"] > 2 * small
    assert large.accessible_name and large.accessible_name in large.text
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not large.is_displayed()
    assert browser.switch_to.active_element == button


@pytest.mark.parametrize("device", [PHONE, SCREEN], ids=["phone", "screen"])
def test_nothing_runs_over_the_side(browser: Any, report: Path, device: dict[str, Any]) -> None:
    opened(browser, report, device)
    width, wide = browser.execute_script(
        """
        const width = document.documentElement.clientWidth;
        const over = [...document.querySelectorAll("body *")].filter((one) =>
            one.checkVisibility() && !one.closest(".scroll, pre") && one.getBoundingClientRect().right > width + 1);
        return [width, over.map((one) => one.outerHTML.slice(0, 80))];
        """
    )
    assert (width, wide) == (device["width"], [])
    assert browser.execute_script("return document.documentElement.scrollWidth") == width
    # Fingers need room.
    heights = [button.size["height"] for button in browser.find_elements("css selector", "#controls button")]
    assert min(heights) >= 38


def test_the_page_is_dark_where_one_wants_it_dark(browser: Any, report: Path) -> None:
    def brightness(selector: str, what: str) -> float:
        colour = browser.execute_script(f"return getComputedStyle(document.querySelector('{selector}')).{what}")
        return sum(int(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]) / 3

    for scheme, is_dark in (("light", False), ("dark", True)):
        opened(browser, report, scheme=scheme)
        for selector in ("body", "#controls input", "#controls select", ".large"):
            back, front = brightness(selector, "backgroundColor"), brightness(selector, "color")
            assert (back < 60 and front > 180) if is_dark else (back > 230 and front < 60)


def test_without_its_script_the_page_shows_everything(browser: Any, report: Path) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        opened(browser, report)
        # The driver's own scripts do not run either: what the page has laid out is asked of the browser.
        snapshot = browser.execute_cdp_cmd("DOMSnapshot.captureSnapshot", {"computedStyles": []})
        nodes, layout = snapshot["documents"][0]["nodes"], snapshot["documents"][0]["layout"]
        laid_out = [snapshot["strings"][nodes["nodeName"][node]] for node in layout["nodeIndex"]]
        assert laid_out.count("H4") >= 120 and laid_out.count("BUTTON") >= 600
        assert not {"INPUT", "SELECT"} & set(laid_out), "controls that would do nothing are not there"
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


@pytest.mark.soak
def test_screenshots_of_a_training(browser: Any, tmp_path: Path) -> None:
    """Into the folder that FARNEAR_SCREENSHOTS names, by which the documentation's are replaced."""
    folder = Path(os.environ.get("FARNEAR_SCREENSHOTS", tmp_path / "pictures"))
    folder.mkdir(parents=True, exist_ok=True)
    take_screenshots(browser, RunFolder(trained_run(tmp_path)).report, folder)
    assert {path.name for path in folder.iterdir()} >= {f"report-{part}.png" for part in ("top", "gallery", "phone")}


def take_screenshots(browser: Any, report: Path, folder: Path) -> None:
    sharp = {**SCREEN, "deviceScaleFactor": 1.5}
    opened(browser, report, sharp)
    save(taken(browser, sharp, "header", "#retrieval"), folder / "report-top.png")
    browser.find_element("css selector", "#controls input").send_keys("sales")
    choose(browser, "loss")
    assert len(shown(browser)) > 5
    browser.execute_script("document.activeElement.blur()")
    third = "#queries > li:not([hidden]) ~ li:not([hidden]) ~ li:not([hidden])"
    save(taken(browser, sharp, "#asked", third), folder / "report-gallery.png")
    phones = []
    for scheme, first in (("light", "header"), ("dark", "#queries")):
        opened(browser, report, PHONE, scheme)
        phones.append(taken(browser, PHONE, first))
    gap = 60
    both = Image.new("RGB", (2 * phones[0].width + gap, phones[0].height), "white")
    for place, phone in enumerate(phones):
        both.paste(phone, (place * (phone.width + gap), 0))
    save(both, folder / "report-phone.png")


def save(picture: Image.Image, path: Path) -> None:
    """With as few colours as nobody misses: it is kept in the repository."""
    picture.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(path, optimize=True)


def taken(browser: Any, device: dict[str, Any], first: str, last: str | None = None) -> Image.Image:
    """A picture from a bit above one element to a bit below the end of another, or to the end of the device."""
    place = "return document.querySelector(arguments[0]).getBoundingClientRect()"
    browser.execute_script("scrollTo(0, 0)")
    top = max(0, browser.execute_script(place, first)["top"] - 30)
    height = device["height"] if last is None else browser.execute_script(place, last)["bottom"] - top + 20
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**device, "height": round(height)})
    browser.execute_script("scrollTo(0, arguments[0])", top)
    return Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
