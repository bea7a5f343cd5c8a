"""The built documentation in headless Chromium, as readers use it: `make browser`.

The pages are served from build/docs/html, or from the folder that BN_JAX_SITE names. Pictures of
some of them go to build/docs/screenshots.
"""

import functools
import http.server
import os
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from playwright.sync_api import Page, ViewportSize, expect, sync_playwright

ROOT = Path(__file__).parents[2]
SITE = Path(os.environ.get("BN_JAX_SITE", ROOT / "build/docs/html"))
SCREENSHOTS = SITE.parent / "screenshots"
PAGES = sorted(
    path.relative_to(SITE).as_posix()
    for path in SITE.rglob("*.html")
    if "_static" not in path.parts  # templates of the theme
)
# The sizes of a small telephone and of a laptop.
NARROW = ViewportSize(width=390, height=844)
WIDE = ViewportSize(width=1280, height=900)
SHOWN = {
    "landing": "index.html",
    "guide": "guides/many_devices.html",
    "claim": "claims/high_order_effects.html",
    "reference": "reference/generated/bn_jax.batch_norm.html",
}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address():
    handler = functools.partial(Quiet, directory=os.fspath(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"), args=["--no-sandbox"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, address):
    context = browser.new_context(
        base_url=address, viewport=WIDE, permissions=["clipboard-read", "clipboard-write"]
    )
    page = context.new_page()
    page.set_default_timeout(20_000)
    yield page
    context.close()


def test_the_site_is_built():
    assert len(PAGES) > 60 and set(SHOWN.values()) <= set(PAGES)


def test_search_finds_fold(page: Page):
    page.goto("/search.html?q=fold")
    results = page.locator("#search-results li a")
    expect(page.locator("#search-results .search-summary")).to_contain_text("finished")
    expect(page.locator("#search-results li").nth(15)).to_be_visible()
    found = [urlsplit(link.get_attribute("href") or "").path for link in results.all()]
    assert any(path.endswith("bn_jax.fold.html") for path in found[:5]), found
    assert any(path.endswith("guides/deploying.html") for path in found), found


def test_no_page_has_an_error_a_foreign_request_or_a_picture_without_text(page: Page, address):
    faults: list[str] = []

    def note(is_fault, fault):
        if is_fault:
            faults.append(fault)

    page.on("console", lambda said: note(said.type == "error", said.text))
    page.on("pageerror", lambda error: note(True, str(error)))
    page.on("request", lambda sent: note(not sent.url.startswith((address, "data:")), sent.url))
    page.on("response", lambda got: note(got.status >= 400, f"{got.status} {got.url}"))
    wrong = {}
    for path in PAGES:
        page.goto(f"/{path}", wait_until="load")
        without = page.locator("main img").evaluate_all(
            "images => images.filter(image => !image.alt.trim()).map(image => image.src)"
        )
        if faults or without:
            wrong[path] = [*faults, *without]
        faults.clear()
    assert wrong == {}


def test_no_page_scrolls_sideways_on_a_telephone(page: Page):
    page.set_viewport_size(NARROW)
    widths = {}
    for path in PAGES:
        page.goto(f"/{path}", wait_until="load")
        width = page.evaluate("document.documentElement.scrollWidth")
        if width > NARROW["width"]:
            widths[path] = width
    assert widths == {}


def copied_from(page: Page, path: str, text: str) -> tuple[str, str]:
    """The code of a page that holds a text, as it is shown, and as its button copies it."""
    page.goto(path)
    block = page.locator("div.highlight", has_text=text).first
    block.hover()
    block.locator("button.copybtn").click()
    expect(block.locator("button.copybtn.success")).to_be_visible()
    return block.locator("pre").inner_text(), page.evaluate("navigator.clipboard.readText()")


def test_code_copies(page: Page):
    shown, copied = copied_from(page, "/quickstart.html", "import")
    assert copied.strip() == shown.strip() != ""


def test_an_example_copies_without_its_prompts(page: Page):
    path = "/reference/generated/bn_jax.batch_norm.html"
    shown, copied = copied_from(page, path, ">>> import")
    assert ">>>" in shown and "import" in copied and ">>>" not in copied


def test_dark_mode_switches(page: Page):
    page.emulate_media(color_scheme="light")
    page.goto("/index.html")
    theme = page.locator("html")
    for name in ("Dark", "Light"):
        page.locator("button.theme-switch-button:visible").first.click()
        page.get_by_role("button", name=name, exact=True).or_(
            page.get_by_text(name, exact=True)
        ).locator("visible=true").first.click()
        expect(theme).to_have_attribute("data-theme", name.lower())
    dark = page.context.new_page()
    dark.emulate_media(color_scheme="dark")
    dark.goto("/faq.html")
    expect(dark.locator("html")).to_have_attribute("data-theme", "light")  # as it was chosen


class Links(HTMLParser):
    """The places of a page that can be linked to, and where it links."""

    def __init__(self, text):
        super().__init__()
        self.places, self.targets = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if "id" in values:
            self.places.add(values["id"])
        if tag == "a" and "href" in values:
            self.targets.append(values["href"])


@functools.cache
def links(path):
    return Links(path.read_text())


def is_broken(page, target):
    parts = urlsplit(target)
    if parts.scheme or parts.netloc or target in ("#", ""):
        return False
    path = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if not path.is_file():
        return True
    named = unquote(parts.fragment)
    return bool(named) and path.suffix == ".html" and named not in links(path).places


def test_every_internal_link_leads_somewhere():
    broken = {
        name: found
        for name in PAGES
        if (found := [link for link in links(SITE / name).targets if is_broken(SITE / name, link)])
    }
    assert broken == {}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [NARROW, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("name", SHOWN)
def test_pictures_to_look_at(page: Page, name, size, scheme):
    page.set_viewport_size(size)
    page.emulate_media(color_scheme=scheme)
    page.goto(f"/{SHOWN[name]}", wait_until="load")
    SCREENSHOTS.mkdir(exist_ok=True)
    picture = SCREENSHOTS / f"{name}-{size['width']}-{scheme}.png"
    page.screenshot(path=picture)
    assert picture.stat().st_size > 5_000
