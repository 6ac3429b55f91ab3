"""What an encoder is, for people: its manifest as Markdown."""

from typing import Any

from patchsight_serve.manifest import Manifest

MEANING = {
    "cls_embedding": "the CLS token",
    "mean_embedding": "the mean of the patch tokens",
    "both_embedding": "CLS and mean, side by side",
    "attention": "of the last block, from CLS to the patches, for each head",
    "patch_tokens": "row by row from the top left",
}


def card(manifest: Manifest, size: int) -> str:
    """size: of `1/model.onnx`, bytes."""
    parts = [
        f"# {manifest.name}",
        f"{manifest.architecture}, {manifest.parameters / 1e6:.2f} million parameters, {size / 1e6:.1f} MB. "
        f"Trained by {manifest.objective} on: {manifest.data}.",
        f"**License**: {manifest.license}",
        "## In and out",
        _signature(manifest),
        "## Measured",
        _measured(manifest),
        "## Use",
        _use(manifest),
        "## Recipe",
        f"Commit {manifest.commit}.\n\n```toml\n{manifest.recipe.strip()}\n```",
        f"Identity: sha256 `{manifest.sha256}`",
    ]
    return "\n\n".join(parts) + "\n"


def _signature(manifest: Manifest) -> str:
    transform, recommended = manifest.transform, f"{manifest.recommended}_embedding"
    lines = [
        "| | shape | |",
        "| --- | --- | --- |",
        f"| `image`, uint8 | `[N, {transform.crop}, {transform.crop}, 3]` | RGB; shorter side to {transform.resize} "
        f"pixels, {transform.filter} with antialiasing, central square; normalized inside |",
    ]
    for name, shape in manifest.outputs.items():
        note = MEANING[name] + ("; **recommended**" if name == recommended else "")
        lines.append(f"| `{name}`, float32 | `[N, {', '.join(map(str, shape))}]` | {note} |")
    return "\n".join(lines)


def _measured(manifest: Manifest) -> str:
    rows = [_knn_rows(name, values) for name, values in manifest.measured.items()]
    if not any(rows):
        return "Nothing yet: `patchsight-knn --json`, then `patchsight-export FILE.json BUNDLE`."
    return "\n".join(
        [
            "| | embedding | images: train, test | k-NN, % of the test images |",
            "| --- | --- | --- | --- |",
            *filter(None, rows),
        ]
    )


def _knn_rows(name: str, values: Any) -> str:
    """One measurement of patchsight-knn; "" for what is none."""
    try:
        by_k = ", ".join(f"{k}: {100 * share:.1f}" for k, share in values["accuracy"].items())
        images = f"{values['train']['images']:,}, {values['test']['images']:,}"
        return f"| {name} | {values['encoder']['output']} | {images} | {by_k} |"
    except (KeyError, TypeError, AttributeError):
        return ""


def _use(manifest: Manifest) -> str:
    return (
        "```sh\n"
        f"patchsight-serve --encoder {manifest.name}\n"
        "curl -s --data-binary @photo.jpg -H 'Content-Type: image/jpeg' "
        f"'http://127.0.0.1:8000/embed?encoder={manifest.name}'\n"
        "```"
    )
