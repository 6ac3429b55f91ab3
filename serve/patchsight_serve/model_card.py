"""What an encoder is, for people: its manifest as Markdown."""

from typing import Any

from patchsight_serve.manifest import Manifest

MEANING = {
    "cls_embedding": "the CLS token",
    "mean_embedding": "the mean of the patch tokens",
    "both_embedding": "CLS and mean, side by side",
    "patch_tokens": "row by row from the top left",
}


def card(manifest: Manifest, size: int) -> str:
    """size: of `1/model.onnx`, bytes."""
    parts = [
        f"# {manifest.name}",
        f"{manifest.architecture}, {manifest.parameters / 1e6:.2f} million parameters, {size / 1e6:.1f} MB, in "
        f"{manifest.precision}. Trained by {manifest.objective} on: {manifest.data}.",
        f"**License**: {manifest.license}",
        "## In and out",
        _signature(manifest),
        "## Measured",
        _measured(manifest),
        *_precision(manifest),
        "## Use",
        _use(manifest),
        "## Recipe",
        f"Commit {manifest.commit}.\n\n```toml\n{manifest.recipe.strip()}\n```",
        f"Identity: sha256 `{manifest.sha256}`",
    ]
    return "\n\n".join(parts) + "\n"


def attention(manifest: Manifest) -> str:
    """Which one the encoder's is."""
    if manifest.attention == "rollout":
        return "rollout over all blocks (arXiv:2005.00928), from CLS to the patches, heads averaged"
    block = "the last block" if manifest.attention == "last" else f"block {manifest.attention}"
    return f"of {block}, from CLS to the patches, for each head"


def _signature(manifest: Manifest) -> str:
    transform, recommended = manifest.transform, f"{manifest.recommended}_embedding"
    side, shapes, any_size = str(transform.crop), manifest.outputs, ""
    if manifest.dynamic_size:
        of = f"multiples of {manifest.patch_size}" if manifest.patch_size else f"from {manifest.size_least}"
        side, any_size = "any", f"; takes other sizes too, {of}, not square ones as well"
        shapes = manifest.outputs_on(-1, -1)
    lines = [
        "| | shape | |",
        "| --- | --- | --- |",
        f"| `image`, uint8 | `[N, {side}, {side}, 3]` | RGB; shorter side to {transform.resize} "
        f"pixels, {transform.filter} with antialiasing, central square; normalized inside{any_size} |",
    ]
    for name, shape in shapes.items():
        note = (attention(manifest) if name == "attention" else MEANING[name]) + (
            "; **recommended**" if name == recommended else ""
        )
        lines.append(f"| `{name}`, float32 | `[N, {', '.join('any' if n < 0 else str(n) for n in shape)}]` | {note} |")
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


def _precision(manifest: Manifest) -> list[str]:
    """What the precision costs and saves, as export measured it; nothing for fp32."""
    try:
        found = manifest.measured["precision"]
        cosine = found["cosine"][f"{manifest.recommended}_embedding"]
        told = [
            f"{found['bytes'] / found['fp32_bytes']:.2f} of the file",
            f"cosine of the recommended embedding {cosine['mean']:.5f} in the mean, {cosine['least']:.5f} at least",
        ]
        if "speed" in found:
            told.append(f"{found['speed']:.2f}× the speed on the CPU that exported it")
        if "top10_overlap" in found:
            told.append(f"{100 * found['top10_overlap']:.1f} % of the ten nearest the same")
        if knn := found.get("knn"):
            told.append(f"{knn['k']}-NN {100 * (knn['accuracy'] - knn['fp32']):+.2f} points")
        images = f"{found['images']:,} images"
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError):
        return []
    return ["## Precision", f"Against the same encoder in fp32, on {images}: {'; '.join(told)}."]


def _use(manifest: Manifest) -> str:
    return (
        "```sh\n"
        f"patchsight-serve --encoder {manifest.name}\n"
        "curl -s --data-binary @photo.jpg -H 'Content-Type: image/jpeg' "
        f"'http://127.0.0.1:8000/embed?encoder={manifest.name}'\n"
        "```"
    )
