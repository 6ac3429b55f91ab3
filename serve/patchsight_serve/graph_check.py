"""Does a graph say and look like what its manifest promises? Asked of every engine that reads one."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from patchsight_serve.errors import BundleError
from patchsight_serve.manifest import METADATA_KEY, Manifest


@dataclass(frozen=True)
class Port:
    """An input or an output of a graph."""

    kind: str  # uint8, float32, or whatever else the engine calls it
    shape: tuple[int | None, ...]  # None: of no fixed size

    def __str__(self) -> str:
        return f"{self.kind} [{', '.join('?' if side is None else str(side) for side in self.shape)}]"


def check_graph(
    manifest: Manifest, metadata: str | None, inputs: Mapping[str, Port], outputs: Mapping[str, Port]
) -> None:
    """metadata: what the ONNX file holds under `METADATA_KEY`.

    Raises:
        BundleError: the file says something else than encoder.json, or the graph takes or gives something else.
    """
    _check_metadata(manifest, metadata)
    side = None if manifest.dynamic_size else manifest.transform.crop
    image = inputs.get("image")
    if len(inputs) != 1 or image is None or (image.kind, image.shape[1:]) != ("uint8", (side, side, 3)):
        told = "[N, H, W, 3]" if side is None else f"[N, {side}, {side}, 3]"
        found = ", ".join(f"{name}: {port}" for name, port in inputs.items())
        raise BundleError(f"{manifest.name}: the graph's input is {found}, not image: uint8 {told}")
    for name, shape in manifest.outputs.items():
        port = outputs.get(name)
        if port is None or (port.kind, len(port.shape)) != ("float32", len(shape) + 1):
            raise BundleError(f"{manifest.name}: output {name!r} is {port}, not float32 [N, {shape}]")


def _check_metadata(manifest: Manifest, inside: str | None) -> None:
    if inside is None:
        raise BundleError(f"{manifest.name}: 1/model.onnx has no metadata {METADATA_KEY!r}; export it again")
    told, found = json.loads(manifest.metadata()), _object(inside)
    if different := sorted(key for key in told | found if told.get(key) != found.get(key)):
        key = different[0]
        raise BundleError(
            f"{manifest.name}: encoder.json says {key} = {told.get(key)!r}, the ONNX file says {found.get(key)!r}"
        )


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
