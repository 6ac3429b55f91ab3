"""The pages of docs/reference: every command's settings and every route, from the parsers and the server themselves.

python docs/reference.py        # writes docs/reference/*.md; a test fails where they are out of date
"""

import argparse
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_settings import CliSettingsSource

from patchsight_export.settings import ExportSettings
from patchsight_serve.app import create_app
from patchsight_serve.config import CommandSettings
from patchsight_serve.embed import EmbedSettings
from patchsight_serve.fake_encoder import FakeEncoder
from patchsight_serve.knn import KnnSettings
from patchsight_serve.models import ModelsSettings
from patchsight_serve.settings import ServeSettings
from patchsight_train.finetune_settings import FineTuneSettings
from patchsight_train.judge.settings import EvalSettings
from patchsight_train.objective_settings import SETTINGS
from patchsight_train.settings import TrainSettings

FOLDER = Path(__file__).parent / "reference"
COMMANDS: dict[str, type[CommandSettings]] = {
    "patchsight-serve": ServeSettings,
    "patchsight-embed": EmbedSettings,
    "patchsight-knn": KnnSettings,
    "patchsight-models": ModelsSettings,
    "patchsight-export": ExportSettings,
    "patchsight-eval": EvalSettings,
    "patchsight-finetune": FineTuneSettings,
}
# What a factory makes as a default, in words: its value is that of the machine.
MADE = {"default_repository": "`model_repository`, else the one that came with the package", "cores": "one per core"}
GENERATED = "<!-- by docs/reference.py; do not edit -->\n\n"


def pages() -> dict[str, str]:
    """The text of each page, by its name."""
    made = {f"{name}.md": command_page(name, settings) for name, settings in COMMANDS.items()}
    return {"patchsight-train.md": training_page(), "http.md": http_page(), **made}


def http_page() -> str:
    """Every route that the OpenAPI schema has: what it does, and its query parameters."""
    rows = ["| call | what it does | query |", "| --- | --- | --- |"]
    with tempfile.TemporaryDirectory() as folder:
        schema = create_app({"fake": FakeEncoder()}, ServeSettings(state_dir=Path(folder))).openapi()
    for path, calls in schema["paths"].items():
        for method, call in calls.items():
            asked = [p["name"] for p in call.get("parameters", []) if p["in"] == "query"]
            query = " ".join(f"`{name}`" for name in asked)
            rows.append(f"| `{method.upper()} {path}` | {cell(call['summary'])} | {query or '–'} |")
    return (
        f"{GENERATED}# HTTP calls\n\nWhat a body may hold, what comes back and which errors there are stands in "
        "`/docs` of every server, and for programs in its `/openapi.json`. How to ask: [HTTP](../api.md).\n\n"
    ) + "\n".join([*rows, ""])


def command_page(name: str, settings: type[CommandSettings]) -> str:
    return GENERATED + f"# {name}\n\n{about(settings)}\n\n{usage(name, settings)}{ways(settings)}{table(settings)}"


def training_page() -> str:
    """What all objectives have once, then each one's own."""
    common = TrainSettings.model_fields
    parts = [
        GENERATED + "# patchsight-train\n\nLearns an encoder from pictures without labels. How the objectives work: "
        "[objectives](../objectives.md).\n\n```text\npatchsight-train OBJECTIVE --data SOURCE [settings]\n```\n\n"
        f"{ways(TrainSettings)}## Settings of all objectives\n\nA default that an objective changes stands in its own "
        f"table below.\n\n{table(TrainSettings)}"
    ]
    for name, settings in SETTINGS.items():
        own = [n for n, field in settings.model_fields.items() if n not in common or said(field) != said(common[n])]
        parts.append(f"## {name}\n\n{about(settings)}\n\n{table(settings, own)}")
    return "\n".join(parts)


def about(settings: type[CommandSettings]) -> str:
    return " ".join((settings.__doc__ or "").split())


def usage(name: str, settings: type[CommandSettings]) -> str:
    words = [name, *(placeholder(action) for action in actions(settings) if not action.option_strings)]
    needed = [f"{flag(a)} {a.dest.upper()}" for a in actions(settings) if a.required and a.option_strings]
    return f"```text\n{' '.join([*words, *needed, '[settings]'])}\n```\n\n"


def placeholder(action: argparse.Action) -> str:
    name = action.dest.upper()
    return {"*": f"[{name} …]", "+": f"{name} …", None: f"{name}"}[action.nargs]  # type: ignore[index]


def ways(settings: type[CommandSettings]) -> str:
    prefix, name = settings.model_config["env_prefix"], settings.table
    return (
        f"A setting is a flag, a variable (`--some-name` is `{prefix}SOME_NAME`), or a key (`some_name`) in the table "
        f"`[{name}]` of `patchsight.toml` in the working folder, or of the file that `--config` names. A flag goes "
        "before a variable, a variable before the file.\n\n"
    )


def table(settings: type[CommandSettings], names: Iterable[str] | None = None) -> str:
    """A row for each of `names`, by default all: flag, default, what it is."""
    chosen = None if names is None else set(names)
    rows = ["| setting | default | what it is |", "| --- | --- | --- |"]
    for action in actions(settings):
        if action.dest in settings.model_fields and (chosen is None or action.dest in chosen):
            default, what = said(settings.model_fields[action.dest])
            what = what or said(TrainSettings.model_fields[action.dest])[1]  # a default of its own, else the same
            rows.append(f"| {shown(action)} | {cell(default)} | {cell(what)} |")
    return "\n".join(rows) + "\n"


def actions(settings: type[CommandSettings]) -> Iterator[argparse.Action]:
    """What the command's parser takes and tells, help aside."""
    parser = CliSettingsSource[Any](settings).root_parser
    yield from (a for a in parser._actions if a.dest != "help" and a.help != argparse.SUPPRESS)


def flag(action: argparse.Action) -> str:
    return action.option_strings[0]


def shown(action: argparse.Action) -> str:
    names = " ".join(f"`{name}`" for name in action.option_strings) or f"`{action.dest.upper()}`"
    return names + (f": {', '.join(f'`{choice}`' for choice in choices(action))}" if choices(action) else "")


def choices(action: argparse.Action) -> list[str]:
    """pydantic-settings writes those of a Literal into the metavar, {a,b}."""
    metavar = str(action.metavar or "")
    return re.sub(r"[{}]", "", metavar).split(",") if metavar.startswith("{") else []


def said(field: FieldInfo) -> tuple[str, str]:
    """A field's default, as it is or as its description tells it, and what else the description says."""
    what = field.description or ""
    told = re.search(r"\s*\(default: ([^)]*)\)", what)
    if told:
        return told[1], what[: told.start()] + what[told.end() :]
    if field.default_factory is not None:
        return MADE[field.default_factory.__name__], what  # type: ignore[union-attr]
    if field.is_required():
        return "needed", what
    return written(field.default), what


def written(value: Any) -> str:
    if hasattr(value, "get_secret_value"):
        value = value.get_secret_value()
    if value is None or value in ("", []):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " ".join(f"`{v}`" for v in value)
    if isinstance(value, int) and value >= 10_000:
        return f"{value:,}"
    return f"`{value}`" if isinstance(value, str | Path) else str(value)


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;").replace("*", "\\*")


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text)
        print(f"wrote {FOLDER.name}/{name}")


if __name__ == "__main__":
    main()
