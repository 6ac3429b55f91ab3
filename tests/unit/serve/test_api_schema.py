"""The OpenAPI schema: every operation is told in full, its examples are what it allows, docs/ has it as it is, and
every call of docs/curl.md works."""

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from on_socket import on_socket

from patchsight_serve.app import create_app
from patchsight_serve.client import Client
from patchsight_serve.dataset import read_dataset
from patchsight_serve.fake_encoder import FakeEncoder
from patchsight_serve.sample_gallery import SAMPLES
from patchsight_serve.settings import ServeSettings

DOCS = Path(__file__).resolve().parents[3] / "docs"
spec = importlib.util.spec_from_file_location("write_api", DOCS / "write_api.py")
assert spec is not None
assert spec.loader is not None
write_api = importlib.util.module_from_spec(spec)
spec.loader.exec_module(write_api)


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return write_api.schema()


def test_docs_are_up_to_date() -> None:
    assert write_api.schema() == write_api.schema()
    for page, text in write_api.pages().items():
        assert page.read_text() == text, f"docs/{page.name} is not as the routes are: run `make api` and commit it"


def problems(name: str, told: dict[str, Any], models: dict[str, Any]) -> list[str]:
    """What an operation does not tell."""
    found = [f"{name}: no {what}" for what in ("summary", "description") if not told.get(what)]
    if not any(code[0] in "45" for code in told["responses"]):
        found.append(f"{name}: no errors")
    for parameter in told.get("parameters", ()):
        schema = parameter["schema"]
        if not parameter.get("description"):
            found.append(f"{name}: parameter {parameter['name']} has no description")
        if "examples" not in schema and "default" not in schema:
            found.append(f"{name}: parameter {parameter['name']} has neither example nor default")
    for kind, body in told.get("requestBody", {}).get("content", {}).items():
        if kind == "application/json" and "example" not in body:
            found.append(f"{name}: its JSON body has no example")
    for code, reply in told["responses"].items():
        model = reply.get("content", {}).get("application/json", {}).get("schema", {}).get("$ref", "").split("/")[-1]
        if "application/json" in reply.get("content", {}) and "examples" not in models.get(model, {}):
            found.append(f"{name}: reply {code} ({model or 'no model'}) has no example: api_schema.REPLIES")
    return found


def test_every_operation_is_told_in_full(schema: dict[str, Any]) -> None:
    models = schema["components"]["schemas"]
    told = [problems(f"{m} {path}", o, models) for path, ops in schema["paths"].items() for m, o in ops.items()]
    assert len(told) > 25
    assert sum(told, []) == []


def test_examples_are_what_the_schema_allows(schema: dict[str, Any]) -> None:
    checked = 0

    def check(example: Any, own: dict[str, Any]) -> None:
        nonlocal checked
        checked += 1
        jsonschema.Draft202012Validator({**own, "components": schema["components"]}).validate(example)

    for model in schema["components"]["schemas"].values():
        for example in model.get("examples", ()):
            closed = {**model, "additionalProperties": False}  # a key that is no longer there is not passed over
            check(example, closed)
    for operations in schema["paths"].values():
        for told in operations.values():
            for parameter in told.get("parameters", ()):
                for example in parameter["schema"].get("examples", ()):
                    check(example, parameter["schema"])
            body = told.get("requestBody", {}).get("content", {}).get("application/json")
            if body:
                check(body["example"], body["schema"])
    assert checked > 80


def test_each_call_of_the_page_works(schema: dict[str, Any], tmp_path: Path) -> None:
    commands = [line for line in (DOCS / "curl.md").read_text().splitlines() if line.startswith("curl ")]
    called = write_api.operations(schema)
    assert len(commands) == len(called) == len({o[:2] for o in called})
    samples = read_dataset(SAMPLES)
    (tmp_path / "shoes.jpg").write_bytes(samples.read(0))
    encoders = {name: FakeEncoder(name, embedding_dim=8) for name in ("simclr-vit-tiny-photos", "simclr-vit-photos")}
    settings = ServeSettings(sample_gallery=False, state_dir=tmp_path, encoder="simclr-vit-tiny-photos")
    with on_socket(create_app(encoders, settings), "critical") as url:
        with Client(url) as client:
            more = [(samples.read(i), {"id": f"more-{i}"}) for i in range(1, 9)]
            assert len(list(client.add_each(more, gallery="mine"))) == 8
        for (method, path, told), line in zip(called, commands, strict=True):
            assert line == write_api.curl(method, path, told)
            asked = line.replace(write_api.SERVER, url).replace("curl -s", "curl -sS --fail-with-body")
            done = subprocess.run(asked, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
            if "application/json" in told["responses"].get("200", {}).get("content", {}) and " -o " not in line:
                json.loads(done.stdout)
    assert (tmp_path / "attention.png").read_bytes()[1:4] == b"PNG"
    assert (tmp_path / "image.jpg").read_bytes()[:2] == b"\xff\xd8"
