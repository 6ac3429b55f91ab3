"""Galleries in the page: choose one, begin a new one, carry it away, change and remove its pictures, delete it."""

import io
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest
from playwright.sync_api import Browser, expect
from visit import Visit, start

KEY = "open sesame"


@pytest.fixture(scope="module")
def url(shared_serve: Callable[..., str]) -> str:
    """A server that asks for a key, without the sample gallery."""
    return start(shared_serve, "--no-sample-gallery", "--api-keys", KEY)


@pytest.fixture
def api(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}) as client:
        yield client


@pytest.fixture
def visit(browser: Browser, url: str) -> Visit:
    """A person who has given their key."""
    visit = Visit(browser, url)
    visit.context.add_init_script(f"sessionStorage.setItem('patchsight.key', '{KEY}')")
    return visit


def fill(api: httpx.Client, gallery: str, photo: bytes, labels: list[str]) -> None:
    for i, label in enumerate(labels):
        query = {"gallery": gallery, "id": f"{label}-{i}", "label": label}
        api.post("/gallery/images", params=query, content=photo + b" " * i).raise_for_status()


def test_choose_begin_and_delete_a_gallery(visit: Visit, api: httpx.Client, photo: bytes) -> None:
    fill(api, "cats", photo, ["cat"] * 3)
    page = visit.page
    page.goto(visit.url)
    chooser = page.locator("#galleries")
    expect(chooser.locator("option")).to_have_text(["cats (3)", "default (0)", "New gallery…"])
    chooser.select_option("cats")
    expect(page).to_have_url(re.compile(r"\?gallery=cats#/image/cat-"))
    expect(page.locator("#gallery-note")).to_contain_text("3 pictures")

    chooser.select_option("New gallery…")
    page.get_by_label("Name of the new gallery").fill("new.one")
    page.get_by_role("button", name="Make it").click()
    expect(page).to_have_url(re.compile(r"\?gallery=new\.one"))
    expect(chooser).to_have_value("new.one")
    expect(page.locator("#gallery-note")).to_have_text("The gallery is empty.")
    visit.upload("mine.jpg", photo)
    visit.shown("mine.jpg")
    page.get_by_role("button", name="Add to the gallery").click()
    expect(chooser.locator("option:checked")).to_have_text("new.one (1)")
    assert [g["name"] for g in api.get("/galleries").json()["galleries"]] == ["cats", "default", "new.one"]

    page.get_by_text("Download or delete").click()
    page.get_by_role("button", name="Delete this gallery").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("1 picture will be gone")
    ok = dialog.get_by_role("button", name="Delete it")
    dialog.get_by_label("Its name").fill("new.on")
    expect(ok).to_be_disabled()
    dialog.get_by_label("Its name").press("Enter")
    dialog.get_by_label("Its name").fill("new.one")
    visit.screenshot("delete-gallery", full_page=False)
    ok.click()
    expect(chooser).to_have_value("default")
    assert "new.one" not in [g["name"] for g in api.get("/galleries").json()["galleries"]]
    visit.end()


def test_what_was_brought_and_the_view_stay_when_another_gallery_is_chosen(
    visit: Visit, api: httpx.Client, photo: bytes
) -> None:
    fill(api, "few", photo, ["few"] * 3)
    fill(api, "many", photo, ["many"] * 5)
    page = visit.open("/?encoder=dino-vit-cifar10&gallery=few#/image/few-1")
    page.locator("#neighbors a").first.click()  # a way of two pictures
    expect(page.locator("#trail li")).to_have_count(2)
    files = [{"name": f"{i}.jpg", "mimeType": "image/jpeg", "buffer": photo + b"!" * i} for i in (1, 2)]
    page.locator("#file").set_input_files(files)  # type: ignore[arg-type]
    visit.shown("1.jpg")

    chooser = page.locator("#galleries")
    chooser.select_option("many")
    expect(page.locator("#neighbors .name")).to_have_text(["many"] * 5)
    visit.shown("1.jpg")
    expect(page.locator("#trail")).to_be_hidden()
    expect(page.locator("#encoder")).to_have_value("dino-vit-cifar10")
    expect(page.get_by_role("button", name="Add all 2 to the gallery")).to_be_visible()
    page.get_by_label("Keep this picture").fill("mine")
    page.get_by_role("button", name="Add to the gallery", exact=True).click()
    expect(page.locator("#gallery-note")).to_contain_text("6 pictures")
    assert api.get("/gallery?gallery=few").json()["count"] == 3

    page.get_by_role("link", name="Map").click()
    expect(page.locator("#map-how")).to_contain_text("6 pictures")
    chooser.select_option("few")
    expect(page).to_have_url(re.compile(r"gallery=few#/map$"))
    expect(page.locator("#map-how")).to_contain_text("3 pictures")
    page.get_by_role("link", name="Groups").click()
    expect(page.locator("#groups")).to_contain_text("3 pictures in")
    chooser.select_option("New gallery…")
    page.get_by_label("Name of the new gallery").fill("fresh")
    page.get_by_role("button", name="Make it").click()
    expect(page.locator("#groups")).to_contain_text("The gallery is empty")
    page.go_back()
    expect(chooser).to_have_value("few")
    expect(page.locator("#groups")).to_contain_text("3 pictures in")

    page.get_by_role("link", name="Picture", exact=True).click()
    page.get_by_role("button", name="Add all 2 to the gallery").click()  # the first one, too: it is not in this gallery
    expect(page.locator("#gallery-note")).to_contain_text("5 pictures")
    visit.end()


def test_carry_away(visit: Visit, api: httpx.Client, photo: bytes, tmp_path: Path) -> None:
    """With a key, which no link could send: the files are those that the API gives."""
    fill(api, "whole", photo, ["cat", "dog"])
    page = visit.open("/?gallery=whole")
    page.get_by_text("Download or delete").click()
    for button, name in (("Vectors and labels", "whole.parquet"), ("Backup with pictures", "whole.sqlite")):
        with page.expect_download() as download:
            page.get_by_role("button", name=button).click()
        assert download.value.suggested_filename == name
        download.value.save_as(tmp_path / name)
    exported = api.get("/gallery/export", params={"gallery": "whole"}).content
    assert pq.read_table(tmp_path / "whole.parquet").equals(pq.read_table(io.BytesIO(exported)))
    with closing(sqlite3.connect(tmp_path / "whole.sqlite")) as backup:
        ids = backup.execute("SELECT id FROM images ORDER BY id").fetchall()
    assert ids == [("cat-0",), ("dog-1",)]
    visit.end()


def test_labels_are_changed_chosen_by_and_pictures_removed(visit: Visit, api: httpx.Client, photo: bytes) -> None:
    fill(api, "mixed", photo, ["cat", "cat", "dog", "dog", "dog"])
    page = visit.open("/?gallery=mixed#/image/cat-0")
    expect(page.locator("#neighbors li")).to_have_count(4)
    page.get_by_label("Only those with").select_option("dog")
    expect(page.locator("#neighbors li")).to_have_count(3)
    expect(page.locator("#vote")).to_be_hidden()
    page.get_by_label("Only those with").select_option("any label")
    expect(page.locator("#neighbors li")).to_have_count(4)

    page.get_by_label("Its label in the gallery").fill("<b>kitten</b>")
    page.get_by_role("button", name="Change the label").click()
    expect(page.locator("#picture-label")).to_have_text("labelled <b>kitten</b>")
    assert api.get("/gallery/images/cat-0?gallery=mixed").json()["label"] == "<b>kitten</b>"
    expect(page.get_by_label("Only those with").locator("option")).to_have_text(
        ["any label", "<b>kitten</b>", "cat", "dog"]
    )
    visit.screenshot("entry")

    remove = page.get_by_role("button", name="Remove the picture")
    remove.click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    assert api.get("/gallery/images/cat-0?gallery=mixed").status_code == 200
    remove.click()
    page.get_by_role("dialog").get_by_role("button", name="Remove it").click()
    visit.shown("cat-1")
    assert api.get("/gallery/images/cat-0?gallery=mixed").status_code == 404
    expect(page.locator("#gallery-note")).to_contain_text("4 pictures")
    visit.end()
