"""Write docs/openapi.json, the schema that a server tells, and docs/curl.md, a call of each of its operations.

python docs/write_api.py        (or: make api)
"""

import json
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

from patchsight_serve.app import create_app
from patchsight_serve.fake_encoder import FakeEncoder
from patchsight_serve.settings import ServeSettings

DOCS = Path(__file__).resolve().parent
SERVER = "http://127.0.0.1:8000"
# What a call shows beyond what it needs, or in place of the schema's example.
SHOWN: dict[str, dict[str, str]] = {
    "POST /gallery/images": {"id": "shoes-1", "label": "shoes"},
    "GET /neighbors": {"k": "5", "vote": "true"},
    "POST /neighbors": {"k": "5", "vote": "true"},
    "GET /gallery/duplicates": {"min_score": "0.95"},
    "POST /gallery/restore": {"gallery": "twin"},
    "POST /gallery/import": {"gallery": "vectors"},
    "POST /gallery/reembed": {"gallery": "twin", "encoder": "simclr-vit-photos"},
}
SENT = {
    "image/*": "--data-binary @shoes.jpg -H 'Content-Type: image/jpeg'",
    "application/vnd.sqlite3": "--data-binary @mine.sqlite -H 'Content-Type: application/vnd.sqlite3'",
    "application/vnd.apache.parquet": "--data-binary @mine.parquet -H 'Content-Type: application/vnd.apache.parquet'",
}
KEPT = {
    "image/jpeg": "image.jpg", "image/png": "attention.png", "application/vnd.sqlite3": "mine.sqlite",
    "application/vnd.apache.parquet": "mine.parquet",
}  # fmt: skip
HEAD = f"""# Every operation as curl

Written by `make api` from the schema, [openapi.json](openapi.json); a test runs all of it
from top to bottom. `shoes.jpg` is any photo. Where the server has keys, add `-H "Authorization: Bearer $KEY"`. Other
bodies (forms with several images, JSON with base64) and all parameters: the schema, or {SERVER}/docs.
"""


def schema() -> dict[str, Any]:
    """As a server tells it, whatever its encoders and settings are."""
    with tempfile.TemporaryDirectory() as state:
        return create_app({"fake": FakeEncoder()}, ServeSettings(state_dir=Path(state))).openapi()


def operations(schema: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Method, path and description of each, in an order in which all can be called: what removes comes last."""
    found = [(m.upper(), path, told) for path, methods in schema["paths"].items() for m, told in methods.items()]
    added = ("POST", "/gallery/images")
    return sorted(found, key=lambda o: (o[:2] != added, o[0] == "DELETE", -len(o[1]) if o[0] == "DELETE" else 0))


def curl(method: str, path: str, told: dict[str, Any]) -> str:
    """A call with all that is needed, as one line."""
    shown, query = SHOWN.get(f"{method} {path}", {}), []
    for parameter in told.get("parameters", ()):
        name = parameter["name"]
        if parameter["in"] == "path":
            path = path.replace(f"{{{name}}}", _example(parameter))
        elif name in shown or parameter["required"] or name == "gallery":
            query.append(f"{name}={quote(shown.get(name) or _example(parameter), safe=',')}")
    url = f"{SERVER}{path}{'?' if query else ''}{'&'.join(query)}"
    body = _body(told["requestBody"]["content"]) if "requestBody" in told else ""
    verb = f"-X {method}" if method not in ("GET", "POST") or (method == "POST" and not body) else ""
    kept = next((f"-o {name}" for kind, name in KEPT.items() if kind in _kinds(told)), "")
    return " ".join(part for part in ("curl -s", verb, body, f"'{url}'" if query else url, kept) if part)


def _example(parameter: dict[str, Any]) -> str:
    return str(parameter["schema"]["examples"][0])


def _body(content: dict[str, Any]) -> str:
    for kind, sent in SENT.items():
        if kind in content:
            return sent
    return f"-H 'Content-Type: application/json' -d '{json.dumps(content['application/json']['example'])}'"


def _kinds(told: dict[str, Any]) -> set[str]:
    return {kind for code, reply in told["responses"].items() if code[0] == "2" for kind in reply.get("content", ())}


def pages() -> dict[Path, str]:
    """The text of both files."""
    found = schema()
    parts = [HEAD]
    for method, path, told in operations(found):
        parts.append(f"## {method} {path}\n\n{told['summary']}.\n\n```sh\n{curl(method, path, told)}\n```\n")
    text = json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False)
    return {DOCS / "openapi.json": text + "\n", DOCS / "curl.md": "\n".join(parts)}


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text)
        print(page)
