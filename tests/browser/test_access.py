"""The page for everybody: axe-core finds nothing serious, keys alone are enough, and what strangers stored is text."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import axe_playwright_python
import httpx
import orjson
from playwright.sync_api import Browser, FilePayload, Page, Route, expect
from visit import DESKTOP, PHONE, Visit

AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


def findings(page: Page, *rules: str) -> list[str]:
    """What axe-core finds on the page as it stands, of impact serious or critical, with the elements meant."""
    expect(page.locator("body.busy")).to_have_count(0)
    page.wait_for_timeout(400)  # transitions of opacity, which would count as low contrast
    page.evaluate(AXE)  # by the debugger's own way, which the page's policy does not concern
    options = {"resultTypes": ["violations"]} | ({"runOnly": list(rules)} if rules else {})
    violations = page.evaluate("options => axe.run(options).then(found => found.violations)", options)
    return [
        f"{v['id']} ({v['impact']}): {[node['target'] for node in v['nodes']]}"
        for v in violations
        if v["impact"] in ("serious", "critical")
    ]


def views(visit: Visit) -> Iterator[str]:
    """The page in all that it can show: each view with its content, a message, and the dialog for the key."""
    page = visit.open()
    yield "picture"
    visit.upload("notes.jpg", b"these are notes")
    expect(page.get_by_role("alert")).to_be_visible()
    yield "message"
    for view in ("map", "groups"):
        page.goto(f"{visit.url}/#/{view}")
        expect(page.locator(f"main#{view}")).to_be_visible()
        page.wait_for_load_state("networkidle")
        yield view

    def refuse(route: Route) -> None:
        route.fulfill(status=401, json={"error": {"code": "unauthorized", "message": "no key", "param": None}})

    page.route("**/encoders", refuse)
    page.reload()
    expect(page.get_by_role("dialog")).to_be_visible()
    yield "dialog"
    visit.end(allowed=r"status of (401|415)")


def test_axe_finds_nothing_serious(browser: Browser, url: str) -> None:
    """What the themes share is looked at once, in light; dark differs by its colors, a phone by what fits."""
    visit = Visit(browser, url, DESKTOP, "light")
    for view in views(visit):
        visit.page.set_viewport_size(DESKTOP)
        visit.page.emulate_media(color_scheme="light")
        assert findings(visit.page) == [], view
        visit.page.emulate_media(color_scheme="dark")
        assert findings(visit.page, "color-contrast") == [], f"{view}, dark"
        visit.page.set_viewport_size(PHONE)
        assert findings(visit.page, "color-contrast", "target-size", "scrollable-region-focusable") == [], view
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], view


def test_axe_is_not_blind(visit: Visit) -> None:
    page = visit.open()
    page.evaluate("document.querySelector('.slider').replaceWith(document.getElementById('opacity'))")
    assert [found.split()[0] for found in findings(page, "label")] == ["label"]
    visit.end()


def focused(page: Page) -> str:
    """The element that has the focus: its tag, its id, address or name, and its text."""
    told: str = page.evaluate("""() => {
        const at = document.activeElement;
        return `${at.localName} ${at.hash || at.id || at.name || ""} ${at.textContent.trim()}`.trim();
    }""")
    return told


def tab_to(page: Page, wanted: str, key: str = "Tab") -> None:
    """Press Tab until what has the focus begins so; each on the way can be seen to have it."""
    for _ in range(60):
        page.keyboard.press(key)
        if focused(page).startswith(wanted):
            return
    raise AssertionError(f"{wanted!r} is not reached by {key}; the last one is {focused(page)!r}")


def test_a_whole_visit_by_keys_alone(visit: Visit, photo: bytes) -> None:
    samples = [httpx.get(f"{visit.url}/gallery/images/{id}/image").content for id in ("dress-01", "hat-01", "shoes-01")]
    for data in samples:
        httpx.post(f"{visit.url}/gallery/images", params={"gallery": "keys"}, content=data).raise_for_status()
    page = visit.open("/?gallery=keys")
    mine: FilePayload = {"name": "mine.jpg", "mimeType": "image/jpeg", "buffer": photo}
    page.on("filechooser", lambda chooser: chooser.set_files(mine))
    page.keyboard.press("Tab")
    assert focused(page) == "a #view Skip to the picture"
    expect(page.locator(".skip")).to_be_in_viewport()
    page.keyboard.press("Enter")
    assert focused(page).startswith("main view")

    tab_to(page, "input head")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("radio", name="Head 0")).to_be_checked()
    tab_to(page, "a #/image/")
    at = page.evaluate("document.activeElement.hash")
    page.keyboard.press("Enter")
    visit.shown(at.removeprefix("#/image/"))
    expect(page.locator("#trail a")).to_have_count(2)
    assert focused(page).startswith("main view")  # not lost with the link that it was on
    tab_to(page, "a #/image/")  # the first is where the way began
    page.keyboard.press("Enter")
    expect(page.locator("#trail")).to_be_hidden()

    tab_to(page, "input file", "Shift+Tab")
    page.keyboard.press("Enter")
    visit.shown("mine.jpg")
    tab_to(page, "input label")
    page.keyboard.type("my label")
    page.keyboard.press("Enter")
    expect(page.locator("#picture-label")).to_have_text("labelled my label")

    page.goto(f"{visit.url}/?gallery=keys#/groups")
    expect(page.locator("main#groups")).to_be_visible()
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    assert focused(page).startswith("main groups")  # the view that is open, whatever it is called
    assert page.evaluate("location.hash") == "#/groups"
    visit.end()


def test_what_strangers_stored_is_text_in_every_view(visit: Visit, photo: bytes) -> None:
    images = f"{visit.url}/gallery/images?gallery=hostile"
    metadata = orjson.dumps({HOSTILE: HOSTILE, "path": f"{HOSTILE}/1.jpg"}).decode()
    for id, data in (("a", photo), ("b", photo), ("c", photo + HOSTILE.encode())):
        said = {"id": id, "label": HOSTILE, "metadata": metadata}
        httpx.post(images, params={"gallery": "hostile", **said}, content=data).raise_for_status()
    for document in (b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", HOSTILE.encode()):
        assert httpx.post(images, content=document).status_code == 415

    page, seen = visit.page, []
    for view in ("#/image/a", "#/map", "#/groups"):
        page.goto(f"{visit.url}/?gallery=hostile{view}")
        page.reload()
        page.wait_for_load_state("networkidle")
        seen.append(page.locator("main:not([hidden])").inner_text())
        assert page.locator("img[src=x], main script").count() == 0
        assert page.title() != "owned"
    assert HOSTILE in seen[0]
    assert HOSTILE in seen[2]
    assert visit.problems == []  # from here on Chromium complains of the sandbox, which lets it style nothing
    reply = page.goto(f"{visit.url}/gallery/images/c/image?gallery=hostile")
    assert reply is not None
    assert reply.headers["content-type"] == "image/jpeg"  # HTML behind a JPEG is a part of the JPEG
    assert page.locator("body > *").evaluate_all("all => all.map(one => one.localName)") == ["img"]
    visit.end(allowed="Content Security Policy")


def test_the_page_weighs_less_than_a_photo(visit: Visit) -> None:
    """All that is loaded before any picture, as it comes over the line."""
    sizes: dict[str, int] = {}
    visit.page.on("response", lambda reply: sizes.update({reply.url: len(reply.body())} if _is_page(reply.url) else {}))
    visit.open()
    visit.page.goto(f"{visit.url}/#/map")
    visit.page.goto(f"{visit.url}/#/groups")
    visit.page.wait_for_load_state("networkidle")
    assert {Path(urlsplit(url).path).suffix for url in sizes} >= {"", ".js", ".css", ".svg"}
    assert sum(sizes.values()) < 300_000
    visit.end()


def _is_page(url: str) -> bool:
    return url.endswith("/") or "/static/" in url
