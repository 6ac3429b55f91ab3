"""A page that needs nothing but itself: style, script and pictures are inside, and nobody is asked for anything."""

import base64
from html import escape
from pathlib import Path

LEGIBLE = 480  # pixels: a picture is never shown narrower than this, on a small screen it is moved sideways
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Cpath d='M1 2q3 11 14 11' "
    "fill='none' stroke='%23d4552b' stroke-width='3'/%3E%3C/svg%3E"
)


def page(title: str, header: str, content: str, head: str = "") -> str:
    """header, content: HTML of `<header>` and of what is in `<main>`. head: more lines for `<head>`."""
    here = Path(__file__)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
{head}<title>{escape(title)}</title>
<link rel="icon" href="{_ICON}">
<style>
{here.with_name("report.css").read_text()}</style>
</head>
<body>
{header}
<main>
{content}</main>
<script>
{here.with_name("report.js").read_text()}</script>
</body>
</html>
"""


def write_page(html: str, path: Path) -> None:
    """Whole or not at all, beside the old one and then in its place. Raises OSError; the old one stays."""
    partial = path.with_suffix(".partial")
    partial.write_text(html, encoding="utf-8")
    partial.replace(path)


def picture(png: bytes, name: str, caption: str) -> str:
    """A whole PNG with its caption as `<figure>`; nothing where it is half written."""
    if not png.startswith(b"\x89PNG\r\n\x1a\n") or b"IEND" not in png[-12:]:
        return ""
    width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))
    size = f'width="{width}" height="{height}" style="min-width: {min(width, LEGIBLE)}px"'
    image = f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" {size} alt="{escape(name)}">'
    return f"<figure><div>{image}</div><figcaption>{escape(caption)}</figcaption></figure>\n"
