"""The one way every command is configured: `--config FILE`, else `./patchsight.toml` < environment < flag.

A command declares its settings as a subclass of `CommandSettings` and builds them once, in its `main`; nothing is
read at import. A file may serve several commands, each in its own table (`[train]`, `[serve]`, …); keys outside of
any table belong to whoever reads the file.
"""

import argparse
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

DEFAULT_FILE = Path("patchsight.toml")
TABLES = ("train", "eval", "finetune", "export", "serve", "embed", "knn", "models", "triton")


class CommandSettings(BaseSettings):
    """Settings of one command. A field `max_batch` is the flag `--max-batch`, the TOML key `max_batch`, and the
    variable `<env_prefix>MAX_BATCH`."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", cli_kebab_case=True, cli_implicit_flags=True, cli_hide_none_type=True,
        cli_avoid_json=True,
    )  # fmt: skip
    table: ClassVar[str]  # the TOML table that holds this command's keys

    config: Path | None = Field(None, description="TOML file with these settings (default: ./patchsight.toml if there)")

    @classmethod
    def settings_customise_sources(  # the rest of the sources is not used
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - the signature is pydantic-settings'
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - no .env files, no secret files
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings  # first wins; the command line goes in front of both

    @classmethod
    def from_command_line(cls, prog: str, argv: Sequence[str]) -> Self:
        """Settings for `prog` from its arguments; a mistake is explained on stderr and exits with status 2."""
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--config", type=Path)
        try:
            values = _read(first.parse_known_args(argv)[0].config, cls.table)
            return cls(**values, _cli_parse_args=list(argv), _cli_prog_name=prog)  # type: ignore[call-arg]
        except ValidationError as error:
            fail(prog, "\n".join(_explain(e, cls) for e in error.errors()))
        except (SettingsError, OSError, tomllib.TOMLDecodeError, ValueError) as error:
            fail(prog, str(error))

    def describe(self) -> str:
        """One `name = value` per line, secrets as `**********`, for the start of every command's output."""
        fields = type(self).model_fields
        return "\n".join(f"  {name} = {getattr(self, name)!s}" for name in fields if name != "config")


def number(value: Any) -> Any:
    """A command line's or variable's digits as an int, for fields of a few allowed numbers: pydantic compares those
    with the text as it is."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def fail(prog: str, message: str, status: int = 2) -> NoReturn:
    """Say what is wrong on stderr and exit: status 2 for usage, 1 for a failure of the work itself."""
    print(f"{prog}: error: {message}", file=sys.stderr)
    raise SystemExit(status)


def _read(path: Path | None, table: str) -> dict[str, Any]:
    if path is None and not DEFAULT_FILE.is_file():
        return {}
    path = path or DEFAULT_FILE
    content = tomllib.loads(path.read_text())
    own = content.pop(table, {})
    for key in [k for k, v in content.items() if isinstance(v, dict)]:
        if key not in TABLES:
            raise ValueError(f"{path}: unknown table [{key}]; the tables are {', '.join(TABLES)}")
        del content[key]
    return {**content, **own}


def _explain(error: Any, settings: type[CommandSettings]) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = ", ".join(sorted(settings.model_fields))
        return f"unknown setting {name!r}; the settings are {known}"
    if error["type"] == "missing":
        return f"{name} is needed: --{name.replace('_', '-')}"
    message = error["msg"].removeprefix("Value error, ")
    if not name:  # of several settings together: the message names them, and all that was given has keys in it
        return str(message)
    secret = settings.model_fields[str(error["loc"][0])].annotation is SecretStr
    if secret or "@" in str(error["input"]):  # an address may have a password in it
        return f"{name}: {message}"
    return f"{name}: {message} (got {error['input']!r})"
