"""The docs: a site without a broken link, which asks nobody for anything; what they say of commands holds."""

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pages import BLOCK, ROOT, blocks, name, pages

REFERENCE = runpy.run_path(str(ROOT / "docs" / "reference.py"))
MADE: dict[str, str] = REFERENCE["pages"]()
NEEDS = {"needs a GPU", "needs Docker", "needs a Triton server", "needs a Milvus server", "needs a cluster"}
FOREIGN = {  # flags of other programs that stand alone in a sentence
    "--data-binary", "--nproc-per-node", "--model-control-mode", "--load-model", "--require-hashes", "--quick",
    "--build-arg", "--gpus",
}  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    line = [Path(sys.executable).parent / "mkdocs", "build", "--strict", "--site-dir", folder]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # that it will have a successor
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, env=quiet)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_every_page_is_built(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        built = site / page.relative_to(ROOT / "docs").with_suffix(".html")
        assert (built.with_stem("index") if page.name == "README.md" else built).is_file(), page


def test_the_site_asks_nobody(site: Path) -> None:
    """Whatever a browser would fetch by itself lies in the site."""
    fetched = re.compile(r"<(?:script|link|img|source|iframe)\b[^>]*?\b(?:src|href)=[\"']?([^\"' >]+)")
    foreign = {
        f"{page.name}: {url}"
        for page in site.rglob("*.html")
        for url in fetched.findall(page.read_text())
        if re.match(r"(https?:)?//", url)
    }
    styles = {s.name for s in site.rglob("*.css") if re.search(r"(url\(|@import)[\"' ]*(https?:)?//", s.read_text())}
    assert not foreign | styles


def test_reference_is_up_to_date() -> None:
    """It is made from the settings: when this fails, run `python docs/reference.py`."""
    there = {page.name: page.read_text() for page in REFERENCE["FOLDER"].glob("*.md")}
    assert there == MADE, "out of date: run python docs/reference.py"


def test_every_setting_is_described() -> None:
    empty = [row for text in MADE.values() for row in text.splitlines() if row.endswith("|  |")]
    assert not empty


def test_reference_has_every_flag(command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """As `--help` itself has them, of a command with positional arguments, and of an objective."""
    for line in (["patchsight-embed"], ["patchsight-train", "dino"]):
        wide = os.environ | {"COLUMNS": "10000"}  # no flag is broken over two lines
        helped = set(re.findall(r"--[a-z][a-z0-9-]*", command(*line, "--help", env=wide).stdout))
        assert helped - {"--help"} <= flags_of(f"{line[0]}.md")


@pytest.mark.parametrize("page", pages(), ids=name)
def test_blocks_are_marked(page: Path) -> None:
    """A block that cannot run anywhere says what it needs; of no block is it left open what it is."""
    for language, rest, body in blocks(page.read_text()):
        assert language, f"{name(page)}: a block without a language: {body[:60]!r}"
        title = re.fullmatch(r'(?:title="([^"]+)")?', rest)
        assert title, f"{name(page)}: {rest!r}"
        assert language != "sh" or title[1] is None or title[1] in NEEDS, f"{name(page)}: {rest!r}"


@pytest.mark.parametrize("page", pages(), ids=name)
def test_commands_and_flags_exist(page: Path) -> None:
    text = page.read_text()
    fenced = [body for language, _, body in blocks(text) if language in ("sh", "text")]
    inline = re.findall(r"`([^`]+)`", BLOCK.sub("", text))
    for body in fenced:
        for line in body.replace("\\\n", " ").splitlines():
            check_line(line, name(page))
    for span in inline:
        check_line(" ".join(span.split()), name(page))


def check_line(line: str, where: str) -> None:
    """Flags behind one of our commands are that command's; a flag that stands alone is of some command."""
    used = re.findall(r"(?:^|[\s=])(--[a-z][a-z0-9-]*)", line)
    command = re.search(r"\b(patchsight-[a-z]+)\b(?!\.md)", line)
    if command:
        assert f"{command[1]}.md" in MADE, f"{where}: there is no command {command[1]}"
        used = re.findall(r"(?:^|[\s=\[])(--[a-z][a-z0-9-]*)", line[command.end() :])
        unknown = set(used) - flags_of(f"{command[1]}.md")
    elif line.startswith("--"):
        unknown = set(used) - FOREIGN - {flag for page in MADE for flag in flags_of(page)}
    else:
        unknown = set()  # another program's
    assert not unknown, f"{where}: {sorted(unknown)} in {line!r}"


def flags_of(page: str) -> set[str]:
    return set(re.findall(r"`(--[a-z][a-z0-9-]*)`", MADE[page])) | {"--help"}
