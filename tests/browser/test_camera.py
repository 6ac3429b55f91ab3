"""A picture from a camera: Chromium's own stand-in for one, and a browser without any."""

from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect
from visit import Visit, start


@pytest.fixture(scope="module")
def url(shared_serve: Callable[..., str]) -> str:
    return start(shared_serve, "--no-sample-gallery")


def arrive(visit: Visit) -> Page:
    visit.page.goto(visit.url)
    expect(visit.page.locator("#gallery-note")).to_have_text("The gallery is empty.")
    return visit.page


def until(page: Page, script: str) -> None:
    """Wait for it; `wait_for_function` would need the page's policy to allow eval."""
    for _ in range(300):
        if page.evaluate(script):
            return
        page.wait_for_timeout(100)
    raise AssertionError(script)


def test_a_picture_is_taken_and_the_camera_stops(visit: Visit) -> None:
    page = arrive(visit)
    live = "document.getElementById('camera-live').srcObject?.getTracks().map(track => track.readyState)"
    for end in ("Cancel", "Escape", "Take it"):
        page.get_by_role("button", name="Use the camera").click()
        dialog = page.get_by_role("dialog")
        expect(dialog).to_be_visible()
        until(page, "document.getElementById('camera-live').videoWidth > 0")
        assert page.evaluate(live) == ["live"]
        page.evaluate("window.track = document.getElementById('camera-live').srcObject.getTracks()[0]")
        visit.screenshot("camera", full_page=False)
        if end == "Escape":
            page.keyboard.press("Escape")
        else:
            dialog.get_by_role("button", name=end).click()
        expect(dialog).to_be_hidden()
        until(page, "window.track.readyState === 'ended'")
    expect(page.locator("#picture-name")).to_contain_text("camera ")
    assert visit.pixels()[..., :3].std() > 10
    expect(page.locator("#strip a[href^='#/upload']")).to_have_count(1)
    visit.end()


def test_a_camera_that_is_refused_is_told(visit: Visit) -> None:
    page = arrive(visit)
    refused = "async () => { throw new DOMException('no', 'NotAllowedError'); }"
    page.evaluate(f"() => {{ navigator.mediaDevices.getUserMedia = {refused}; }}")
    page.get_by_role("button", name="Use the camera").click()
    expect(page.get_by_role("alert")).to_contain_text("Allow the camera for this address")
    visit.end()


def test_without_a_camera_there_is_no_button(visit: Visit) -> None:
    visit.context.add_init_script("navigator.mediaDevices.enumerateDevices = async () => [{ kind: 'audioinput' }]")
    page = arrive(visit)
    expect(page.get_by_text("A whole folder")).to_be_visible()
    expect(page.get_by_role("button", name="Use the camera")).to_be_hidden()
    visit.end()
