"""patchsight-models: what is in a model repository; list, show, verify, remove, and for Triton."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg, CliToggleFlag, SettingsConfigDict

from patchsight_serve.config import CommandSettings, fail
from patchsight_serve.errors import InvalidRequest, PatchsightError
from patchsight_serve.manifest import default_repository

PROG = "patchsight-models"
Backend = Literal["onnxruntime", "python"]  # as in triton_config, which takes gRPC along


class ModelsSettings(CommandSettings):
    """Look after a model repository. list: all encoders, a line each. show NAME: the model card, as Markdown. verify
    [NAME …]: every file against the others, and the graph by running it. remove NAME …: for good. triton [NAME …]: as
    models for Triton's python backend, or with TensorRT; its onnxruntime backend takes the repository as it is."""

    model_config = SettingsConfigDict(env_prefix="PATCHSIGHT_", cli_shortcuts={"as-json": "json"})
    table: ClassVar[str] = "models"

    action: CliPositionalArg[Literal["list", "show", "verify", "remove", "triton"]] = Field(description="what to do")
    names: CliPositionalArg[list[str]] = Field([], description="encoders, by the names of their folders")
    model_repository: Path = Field(
        default_factory=default_repository, description="folder with one encoder bundle per subfolder"
    )
    to: Path = Field(Path("triton_models"), description="triton: folder to write the models into")
    backend: Backend = Field("python", description="triton: what runs the graph there")
    tensorrt_cache: str | None = Field(
        None, description="triton: run on TensorRT in fp16, and keep its engines in this folder of Triton's machine"
    )
    as_json: CliToggleFlag[bool] = Field(False, description="list, show: print JSON, for programs")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and do. Exits with 2 on a wrong setting, 1 if an encoder is damaged or not there."""
    settings = ModelsSettings.from_command_line(PROG, sys.argv[1:] if argv is None else argv)
    actions: dict[str, Callable[[ModelsSettings], bool]] = {
        "list": list_all, "show": show, "verify": verify, "remove": remove, "triton": triton,
    }  # fmt: skip
    try:
        sound = actions[settings.action](settings)
    except (PatchsightError, OSError) as error:
        fail(PROG, str(error), status=1)
    if not sound:
        raise SystemExit(1)


def list_all(settings: ModelsSettings) -> bool:
    """A table, or a JSON object of manifests by name. A damaged bundle has its error there, and hides no other."""
    from patchsight_serve.bundle_list import bundles_by_name, table

    found = bundles_by_name(settings.model_repository)
    if settings.as_json:
        rows = {
            name: {"error": str(entry)} if isinstance(entry, PatchsightError) else entry.model_dump(mode="json")
            for name, entry in found.items()
        }
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        print(table(settings.model_repository, found))
    return not any(isinstance(entry, PatchsightError) for entry in found.values())


def show(settings: ModelsSettings) -> bool:
    from patchsight_serve.manifest import load_manifest
    from patchsight_serve.model_card import card

    for bundle in named(settings):
        manifest = load_manifest(bundle)
        size = (bundle / "1" / "model.onnx").stat().st_size
        print(manifest.model_dump_json(indent=2) if settings.as_json else card(manifest, size))
    return True


def verify(settings: ModelsSettings) -> bool:
    """All, where none is named: the verdict on each, whatever the others'."""
    from patchsight_serve.bundle_check import check
    from patchsight_serve.repository import bundles

    sound = True
    for bundle in named(settings) if settings.names else bundles(settings.model_repository):
        try:
            facts = check(bundle)
        except PatchsightError as error:
            sound = False
            print(f"{bundle.name}: DAMAGED\n  {error}")
        else:
            print(f"{bundle.name}: sound\n" + "\n".join(f"  {fact}" for fact in facts))
    return sound


def remove(settings: ModelsSettings) -> bool:
    """Each vanishes at once for whoever looks; what a crash leaves begins with a dot, as an unfinished export does."""
    import shutil

    for bundle in named(settings):
        gone = bundle.with_name(f".{bundle.name}.removed")
        shutil.rmtree(gone, ignore_errors=True)
        bundle.rename(gone)
        shutil.rmtree(gone)
        print(f"removed {bundle}")
    return True


def triton(settings: ModelsSettings) -> bool:
    """All, where none is named."""
    from patchsight_serve.repository import bundles
    from patchsight_serve.triton_models import write_triton_models

    if settings.tensorrt_cache is not None and settings.backend != "onnxruntime":
        raise InvalidRequest("--tensorrt-cache needs --backend onnxruntime: the python backend has no TensorRT")
    chosen = named(settings) if settings.names else bundles(settings.model_repository)
    if not chosen:
        raise InvalidRequest(f"{settings.model_repository}: no encoder there")
    for model in write_triton_models(chosen, settings.to, settings.backend, settings.tensorrt_cache):
        print(f"wrote {model}")
    return True


def named(settings: ModelsSettings) -> list[Path]:
    """The bundles' folders, in the order asked for, each once.

    Raises:
        InvalidRequest: none is named, or one is not there; nothing has been done then.
    """
    from patchsight_serve.repository import bundles

    if not settings.names:
        raise InvalidRequest(f"{settings.action} needs the name of an encoder: {PROG} {settings.action} NAME")
    known = {bundle.name: bundle for bundle in bundles(settings.model_repository)}
    for name in settings.names:
        if name not in known:
            there = ", ".join(known) or "none"
            raise InvalidRequest(f"no encoder {name!r} in {settings.model_repository}; there is {there}")
    return [known[name] for name in dict.fromkeys(settings.names)]


if __name__ == "__main__":
    main()
