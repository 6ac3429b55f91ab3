"""README.md and the pages of docs/: which there are, and the commands on them. No test, and nothing of the project."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
BLOCK = re.compile(r"^( *)```(\w*)([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    """Those that people wrote: README first, then docs/ by name."""
    written = [p for p in sorted((ROOT / "docs").rglob("*.md")) if p.parent.name != "reference"]
    return [README, *written]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(text: str) -> list[tuple[str, str, str]]:
    """Of each fenced block: its language, what else stands behind the fence, and its text."""
    return [(language, rest.strip(), body) for _, language, rest, body in BLOCK.findall(text)]


def commands(page: Path) -> list[str]:
    """Every command in the `sh` blocks of a page that run anywhere, in order; comments cut off, continued lines joined.

    A block with a title, as in ```sh title="needs a GPU", does not run anywhere.
    """
    found = [body for language, rest, body in blocks(page.read_text()) if language == "sh" and not rest]
    lines = [line for block in found for line in block.replace("\\\n", " ").splitlines()]
    return [" ".join(line.split(" #")[0].split()) for line in lines if line.split("#")[0].strip()]


def scripts(page: Path) -> dict[str, str]:
    """The `python` blocks that have a file's name for a title: the file, and what is in it."""
    found = blocks(page.read_text())
    return {rest[7:-1]: body for language, rest, body in found if language == "python" and rest.startswith('title="')}
