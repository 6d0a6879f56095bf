"""The report in a real headless Chromium: silent, alone, whole, readable in light and dark, on a phone, by keyboard."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bittern.page.page import write_page
from tests import manifests
from tests.test_page import HOSTILE, QUANTIZED, UPTRAINED, poison

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
NAMES = {"quantized": QUANTIZED, "uptrained": UPTRAINED, "schema_1": ["bits", "error"], "hostile": QUANTIZED}
SIZES = {"desktop": 1280, "phone": 390}
LEAST = 4.5
"""Contrast of text that WCAG 2.2 asks for; 3 is enough for large text."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium that notes what it says on its console and what it asks for."""
    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The reports by name."""
    folder = tmp_path_factory.mktemp("pages")
    made = {name: getattr(manifests, name)() for name in ("quantized", "uptrained", "schema_1")}
    made["hostile"] = poison(manifests.quantized(), itertools.cycle(HOSTILE))
    for name, manifest in made.items():
        (folder / f"{name}.json").write_text(json.dumps(manifest))
        write_page(folder / f"{name}.json", folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in made}


def show(browser: Any, page: Path, width: int = 1280, scheme: str = "light") -> None:
    """Open a page at a width, in light or dark."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get(page.as_uri())


def asked_for(browser: Any) -> list[str]:
    """The addresses that were asked for since this was last called."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event for event in events if event["method"] == "Network.requestWillBeSent"]
    return [event["params"]["request"]["url"] for event in sent]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_said_and_nothing_is_asked_for(browser: Any, pages: dict[str, Path], name: str) -> None:
    browser.get("about:blank")
    browser.get_log("browser"), asked_for(browser)
    show(browser, pages[name])
    browser.execute_script("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert browser.get_log("browser") == []
    assert {url for url in asked_for(browser) if not url.startswith("data:")} == {pages[name].as_uri()}
    assert browser.execute_script("return window.hacked") is None
    assert browser.execute_script("return document.querySelectorAll('script, iframe, object, embed, img').length") == 0


def test_a_page_that_says_and_asks_is_noticed(browser: Any, pages: dict[str, Path]) -> None:
    """What the test above relies on; and the page's own policy stops what would get into it."""
    got: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            got.append(self.path)
            self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    more = f"<img src='{address}/x.png'><script>window.hacked = 1; console.error('no')</script>"
    loud, tamed = (pages["quantized"].with_name(name) for name in ("loud.html", "tamed.html"))
    loud.write_text(more)
    tamed.write_text(pages["quantized"].read_text().replace("</main>", f"{more}</main>"))
    try:
        asked_for(browser)
        show(browser, loud)
        assert browser.get_log("browser") and f"{address}/x.png" in asked_for(browser)
        assert browser.execute_script("return window.hacked") == 1 and got == ["/x.png"]
        show(browser, tamed)
        assert browser.get_log("browser")  # it says what it has stopped
        assert browser.execute_script("return window.hacked") is None and got == ["/x.png"]
    finally:
        server.shutdown()
        server.server_close()


CHARTS = """
return [...document.querySelectorAll('svg.chart')].map(svg => {
  const named = svg.getAttribute('aria-labelledby').split(' ').map(id => document.getElementById(id).textContent);
  const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
  const outside = [...svg.querySelectorAll('text, path, use, rect')].filter(each => {
    if (each.closest('defs, clipPath') || each.closest('[clip-path]')) return false;
    const own = each.getBoundingClientRect();
    return own.left < box.left - 1.5 || own.right > box.right + 1.5 || own.top < box.top - 1.5
        || own.bottom > box.bottom + 1.5;
  }).map(each => each.textContent || each.tagName);
  const figure = svg.closest('figure');
  return {
    name: figure.id, named, width: box.width, height: box.height, outside,
    ratio: box.width / view.width, role: svg.getAttribute('role'),
    texts: svg.querySelectorAll('text').length, shapes: svg.querySelectorAll('path, use').length,
    rows: figure.querySelectorAll('details table tbody tr').length,
  };
});
"""


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_every_chart_is_there_and_whole(browser: Any, pages: dict[str, Path], name: str, size: str) -> None:
    show(browser, pages[name], SIZES[size])
    charts = browser.execute_script(CHARTS)
    assert sorted(chart["name"] for chart in charts) == sorted(f"chart-{each}" for each in NAMES[name])
    for chart in charts:
        assert chart["role"] == "img" and all(text.strip() for text in chart["named"])
        assert chart["width"] > 250 and chart["height"] > 40, chart
        assert chart["texts"] and chart["shapes"] > 2 and chart["rows"] > 0, chart
        assert chart["ratio"] > 0.9, "its text would be too small"
        assert chart["outside"] == [], (chart["name"], chart["outside"])


# Colours of text and of what lies behind it, by what the browser finds at a few points of each text.
CONTRAST = """
const parse = text => { const n = text.match(/[\\d.]+/g).map(Number); return {rgb: n.slice(0, 3), a: n[3] ?? 1}; };
const linear = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
const ratio = (one, other) => {
  const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
};
const behind = (element, x, y) => {
  for (const each of document.elementsFromPoint(x, y)) {
    if (each.closest('text') || each === element) continue;
    const style = getComputedStyle(each);
    if (each instanceof SVGGeometryElement) {
      if (style.fill !== 'none') return parse(style.fill).rgb;
    } else if (!(each instanceof SVGElement)) {
      const found = parse(style.backgroundColor);
      if (found.a === 1) return found.rgb;
    }
  }
  return parse(getComputedStyle(document.body).backgroundColor).rgb;
};
document.querySelectorAll('details').forEach(each => each.open = true);
const found = [];
const texts = [...document.querySelectorAll('body *')].filter(each =>
  [...each.childNodes].some(node => node.nodeType === 3 && node.textContent.trim())
  && !each.closest('title, desc, style, .skip, .unseen') && each.getClientRects().length);
for (const each of texts) {
  each.scrollIntoView({block: 'center', inline: 'center'});
  const style = getComputedStyle(each), svg = each instanceof SVGElement;
  const ink = parse(svg ? style.fill : style.color).rgb, box = each.getClientRects()[0];
  const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && +style.fontWeight >= 700);
  const paper = behind(each, box.left + box.width / 2, box.top + box.height / 2);
  found.push([ratio(ink, paper), large, each.textContent.trim().slice(0, 40)]);
}
return found;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["quantized", "uptrained"])
def test_text_stands_out(browser: Any, pages: dict[str, Path], name: str, scheme: str) -> None:
    show(browser, pages[name], scheme=scheme)
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    values = [int(value) for value in paper.removeprefix("rgb(").removesuffix(")").split(",")]
    assert (sum(values) > 600) if scheme == "light" else (sum(values) < 150)
    found = browser.execute_script(CONTRAST)
    assert len(found) > 150
    assert [each for each in found if each[0] < (3 if each[1] else LEAST)] == []


def test_text_that_does_not_stand_out_is_noticed(browser: Any, pages: dict[str, Path]) -> None:
    show(browser, pages["quantized"])
    browser.execute_script("document.documentElement.style.setProperty('--on-heat-6', '#8f4e11')")
    browser.execute_script("document.documentElement.style.setProperty('--muted', '#bbbbbb')")
    low = [text for ratio, large, text in browser.execute_script(CONTRAST) if ratio < (3 if large else LEAST)]
    assert "2.1" in low and "Size" in low  # the darkest cell, the name of a figure


STRUCTURE = """
const all = selector => [...document.querySelectorAll(selector)];
return {
  language: document.documentElement.lang,
  title: document.title,
  headings: all('h1, h2, h3, h4').map(each => +each.tagName[1]),
  empty: all('h1, h2, h3, figcaption, caption, summary').filter(each => !each.textContent.trim()).length,
  landmarks: ['header', 'nav', 'main', 'footer'].map(name => all(name).length),
  doubled: all('[id]').map(each => each.id).filter((id, at, ids) => ids.indexOf(id) !== at),
  nowhere: all('a').filter(each => !document.getElementById(each.hash.slice(1))).map(each => each.href),
  unscoped: all('th:not([scope])').length,
  uncaptioned: all('table').filter(each => !each.caption).length,
  headless: all('section').filter(each => !document.getElementById(each.getAttribute('aria-labelledby'))).length,
  regions: [...all('[role=region]').map(each => each.getAttribute('aria-label')),
    ...all('section').map(each => document.getElementById(each.getAttribute('aria-labelledby')).textContent)],
  summaries: all('summary').map(each => each.textContent.trim()),
  ragged: all('table').filter(each => new Set([...each.rows].map(row => row.cells.length)).size > 1).length,
  tabindex: all('[tabindex]').filter(each => each.tabIndex > 0).length,
};
"""


@pytest.mark.parametrize("name", NAMES)
def test_structure(browser: Any, pages: dict[str, Path], name: str) -> None:
    show(browser, pages[name])
    found = browser.execute_script(STRUCTURE)
    assert found["language"] == "en" and found["title"].endswith("bittern report")
    levels = found["headings"]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels)), "a level is skipped"
    assert found["landmarks"] == [1, 1, 1, 1]
    for fault in ("empty", "unscoped", "uncaptioned", "headless", "ragged", "tabindex"):
        assert found[fault] == 0, fault
    assert found["doubled"] == [] and found["nowhere"] == []
    assert all(found["regions"]) and len(set(found["regions"])) == len(found["regions"]), "two with the same name"
    assert len(set(found["summaries"])) == len(found["summaries"]), "two with the same name"


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
@pytest.mark.parametrize("name", NAMES)
def test_no_page_is_wider_than_its_window(browser: Any, pages: dict[str, Path], name: str, width: int) -> None:
    show(browser, pages[name], width)
    for opened in (False, True):
        if opened:
            browser.execute_script("document.querySelectorAll('details').forEach(each => each.open = true)")
        wide = "const page = document.documentElement; return page.scrollWidth - page.clientWidth"
        assert browser.execute_script(wide) == 0
        browser.execute_script("window.scrollTo(1000, 0)")
        assert browser.execute_script("return window.scrollX") == 0


FOCUS = """
const at = document.activeElement, style = getComputedStyle(at), box = at.getBoundingClientRect();
return {
  tag: at.tagName, text: at.textContent.trim().slice(0, 80), hash: at.hash || '',
  outline: style.outlineStyle === 'none' ? 0 : parseFloat(style.outlineWidth),
  shown: box.width > 0 && box.right > 0 && box.bottom > 0 && box.top < innerHeight && box.left < innerWidth,
};
"""


def test_everything_is_reached_by_keyboard_and_seen_to_be(browser: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver import ActionChains, Keys

    def press(key: str) -> dict[str, Any]:
        ActionChains(browser).send_keys(key).perform()
        found: dict[str, Any] = browser.execute_script(FOCUS)
        return found

    show(browser, pages["quantized"], 390)
    reached = [press(Keys.TAB)]
    assert reached[0]["text"] == "Skip to the report" and reached[0]["shown"] and reached[0]["outline"] >= 2
    wanted = browser.execute_script("return document.querySelectorAll('a, summary').length")
    while len(reached) < wanted + 20:
        found = press(Keys.TAB)
        if found["tag"] == "BODY":
            break
        reached.append(found)
    assert all(each["shown"] and each["outline"] >= 2 for each in reached)
    assert [each["tag"] for each in reached].count("SUMMARY") == len(
        browser.execute_script("return [...document.querySelectorAll('summary')].map(each => each.textContent)")
    )
    assert [each["tag"] for each in reached].count("A") + [each["tag"] for each in reached].count("SUMMARY") == wanted


def test_the_skip_link_and_the_tables_work_by_keyboard(browser: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.support.wait import WebDriverWait

    def press(*keys: str) -> dict[str, Any]:
        for key in keys:
            ActionChains(browser).send_keys(key).perform()
        found: dict[str, Any] = browser.execute_script(FOCUS)
        return found

    show(browser, pages["quantized"], 390)
    assert press(Keys.TAB, Keys.ENTER)["tag"] == "MAIN"
    found = press(Keys.TAB)
    assert found["tag"] == "SUMMARY" and "Size before and after" in found["text"]
    press(Keys.ENTER)
    assert browser.execute_script("return document.querySelector('#chart-size details').open")
    assert press(Keys.TAB)["tag"] == "DIV"  # the table, which scrolls sideways by the arrow keys
    assert browser.execute_script("return document.activeElement.getAttribute('role')") == "region"
    before = browser.execute_script("const e = document.activeElement; return [e.scrollWidth, e.clientWidth]")
    if before[0] > before[1]:
        press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
        moved = "return document.activeElement.scrollLeft > 0"
        WebDriverWait(browser, 10).until(lambda _: browser.execute_script(moved))  # it glides
