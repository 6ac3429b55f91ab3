"""`report.html` of a run folder: one page that can be opened beside the training, mailed, and kept.

It is a pure function of the folder and asks nobody for anything: pictures and charts are in it. Whatever is missing or
half written is left out.
"""

import tomllib
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from patchsight_serve.errors import InvalidRequest
from patchsight_train.architecture import ViTConfig
from patchsight_train.headlines import tiles, warnings
from patchsight_train.history import read_history
from patchsight_train.objective_settings import SETTINGS
from patchsight_train.panels import encoder_of, sections
from patchsight_train.progress import Progress
from patchsight_train.webpage import page, picture, write_page

REFRESH_S = 15  # while the run is not complete
CAPTIONS = {
    "views": "What the network sees: pictures, and the views of them that it is trained on.",
    "reconstructions": "What the decoder makes of what the encoder saw.",
    "attention": "Where the encoder looks: attention of its last block, from the CLS token to the patches.",
    "neighbors": "Nearest neighbors: pictures, and those whose embeddings are most similar, the most similar first.",
}


def write_report(run: Path) -> None:
    """Write `run/report.html` beside the old one and put it in its place.

    Raises:
        InvalidRequest: `run` is no folder.
        OSError: it cannot be written; the old one stays.
    """
    if not run.is_dir():
        raise InvalidRequest(f"{run}: not a run folder")
    write_page(render(run), run / "report.html")


def render(run: Path) -> str:
    """The page of a run folder."""
    settings, config = _read_settings(run)
    history = read_history(run)
    progress = Progress.of(history, config)
    charts = "".join(
        f'<section><h2>{heading}</h2><div class="charts">{content}</div></section>\n'
        for heading, content in sections(history, config)
    )
    refresh = "" if progress.complete else f'<meta http-equiv="refresh" content="{REFRESH_S}">\n'
    name = run.resolve().name
    title = f"{progress.short} · {name}" if progress.short else name
    content = f"{warnings(history)}{tiles(history, config)}{charts}{_pictures(run)}{_settings(settings)}"
    return page(title, _header(name, config, progress), content, refresh)


def _read_settings(run: Path) -> tuple[str, dict[str, Any]]:
    """`config.toml` as it is written, and what it says; nothing where it is missing or damaged."""
    try:
        text = (run / "config.toml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return "", {}
    try:
        return text, tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return text, {}


def _header(name: str, config: Mapping[str, Any], progress: Progress) -> str:
    objective = SETTINGS.get(str(config.get("objective")))
    lead = f'<p class="lead">{escape((objective.__doc__ or "").strip())}</p>' if objective else ""
    facts = "".join(f"<div><dt>{key}</dt><dd>{escape(text)}</dd></div>" for key, text in _facts(config))
    return f"""<header>
<p class="brand"><span>patchsight · training report</span><span id="written"></span></p>
<h1>{escape(name)}</h1>
{lead}
<div class="progress" role="progressbar" aria-label="Progress" aria-valuenow="{100 * progress.share:.1f}">
<div style="width: {progress.share:.2%}"></div></div>
<p class="state">{escape(progress.sentence)}</p>
<dl class="facts">{facts}</dl>
</header>"""


def _facts(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is trained on what, as far as the settings tell."""
    encoder = _encoder(config)
    if encoder:
        yield "Encoder", encoder
    data = config.get("dataset") or ", ".join(str(d) for d in config.get("data", []))
    if data:
        yield "Data", str(data)
    if "batch_size" in config:
        yield "Batch", f"{config['batch_size']} images"
    if "init" in config:
        yield "Started from", str(config["init"])
    if "commit" in config:
        yield "Code", f"{config['commit']}, torch {config.get('torch', '?')}"


def _encoder(config: Mapping[str, Any]) -> str:
    encoder = encoder_of(config)
    if encoder is None:
        return ""
    if isinstance(encoder, ViTConfig):
        return (
            f"ViT, {encoder.depth} blocks, width {encoder.width}, {encoder.heads} heads, "
            f"patches of {encoder.patch_size} in {encoder.image_size} px"
        )
    return f"ResNet-{encoder.depth}, {encoder.stem} stem, {encoder.image_size} px"


def _pictures(run: Path) -> str:
    """Those that evaluations draw, then any other: whole PNGs of `run/pictures`, inlined."""
    found = {path.stem: path for path in sorted((run / "pictures").glob("*.png"))}
    names = [name for name in CAPTIONS if name in found] + [name for name in found if name not in CAPTIONS]
    figures = "".join(_picture(name, found[name]) for name in names)
    return f'<section><h2>Pictures</h2><div class="pictures">{figures}</div></section>\n' if figures else ""


def _picture(name: str, path: Path) -> str:
    try:
        png = path.read_bytes()
    except OSError:
        return ""  # replaced just now
    return picture(png, name, CAPTIONS.get(name, name.replace("_", " ")))


def _settings(text: str) -> str:
    if not text:
        return "<p>config.toml is missing: nothing is known of the settings.</p>\n"
    return f"<details><summary>Settings: config.toml</summary><pre>{escape(text)}</pre></details>\n"
