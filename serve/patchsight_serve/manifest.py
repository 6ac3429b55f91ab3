"""What an exported encoder promises: the contract between export (the writer) and serve (the reader).

A bundle is `model_repository/<name>/{config.pbtxt, encoder.json, 1/model.onnx}`. Its identity is its name and the
sha256 of `1/model.onnx`. Everything that determines the numbers also stands in the ONNX file's own metadata under
`METADATA_KEY`, so that a lone file explains itself.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from patchsight_serve.errors import BundleError

METADATA_KEY = "patchsight"
YOUNGER = ("precision", "dynamic_size", "attention")  # fields that are left out where they have their default
RESNET_LEAST = 32  # pixels: what a ResNet's five halvings leave one cell of
BUNDLE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

Positive = Annotated[int, Field(gt=0)]


class Transform(BaseModel):
    """The evaluation transform, from encoded image bytes to the uint8 array `(crop, crop, 3)` the graph takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # pillow-scaled: a JPEG whose shorter side is at least twice `scaled_side` is decoded at 1/2, 1/4 or 1/8 of its
    # size, which is several times as fast and moves the pixels a little.
    decoder: Literal["pillow", "pillow-scaled"] = "pillow"
    resize: Positive  # pixels of the shorter side, before the crop
    filter: Literal["bilinear", "bicubic", "lanczos"] = "bicubic"
    antialias: Literal[True] = True  # Pillow's resampling always is
    crop: Positive  # pixels of the central square

    @property
    def scaled_side(self) -> int | None:
        """The shorter side that a JPEG keeps at least where it is decoded at a part of its size; None: it never is.
        Twice what it is resized to, so that the resizing still does the smoothing, and enough for a thumbnail."""
        return max(2 * self.resize, 160) if self.decoder == "pillow-scaled" else None


class Manifest(BaseModel):
    """`encoder.json`. `sha256` and `measured` are not in the ONNX file's metadata: the first cannot be, the second
    may be filled in later."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=f"^{BUNDLE_NAME.pattern}$")]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    objective: str
    architecture: str
    parameters: Positive
    image_size: Positive
    patch_size: Positive | None
    embedding_dim: Positive
    num_heads: Positive | None  # None without a CLS token
    prefix_tokens: Annotated[int, Field(ge=0)]  # CLS and registers, in front of the patch tokens
    recommended: Literal["cls", "mean", "both"]  # both: CLS and mean side by side, 2 · embedding_dim numbers
    transform: Transform
    data: str
    recipe: str
    commit: str
    license: str
    # Younger than the first bundles, so that each of them says nothing where it has the default.
    precision: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"  # what the graph computes in
    dynamic_size: bool = False  # the graph also takes other sizes: multiples of `size_step`, not square ones too
    attention: Literal["last", "rollout"] | Positive = "last"  # of which block, from 1; rollout: over all, one head
    measured: dict[str, Any] = {}

    @property
    def outputs(self) -> dict[str, tuple[int, ...]]:
        """Names of the graph's outputs and their shapes without the batch axis, for an image of `image_size`."""
        side = self.image_size // (self.patch_size or self.image_size)
        return self.outputs_on(side, side)

    def outputs_on(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """The same for an image of that many patches. ResNets have `mean_embedding` alone; a ViT without CLS token has
        neither that token nor its attention."""
        D = self.embedding_dim
        if self.patch_size is None:
            return {"mean_embedding": (D,)}
        if self.num_heads is None:
            return {"mean_embedding": (D,), "patch_tokens": (rows, columns, D)}
        return {
            "cls_embedding": (D,),
            "mean_embedding": (D,),
            **({"both_embedding": (2 * D,)} if self.recommended == "both" else {}),
            "attention": (1 if self.attention == "rollout" else self.num_heads, rows, columns),
            "patch_tokens": (rows, columns, D),
        }

    @property
    def size_step(self) -> int:
        """Sides of a picture are multiples of it, where the graph takes any: the patch size, 1 for ResNets."""
        return self.patch_size or 1

    @property
    def size_least(self) -> int:
        """The shortest side of a picture, in pixels, where the graph takes any."""
        return self.patch_size or RESNET_LEAST

    def metadata(self) -> str:
        """The part that travels inside the ONNX file, as canonical JSON."""
        fields = self.model_dump(exclude={"name", "sha256", "measured"})
        for younger in YOUNGER:
            if fields[younger] == type(self).model_fields[younger].default:
                del fields[younger]
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))


def default_repository() -> Path:
    """`./model_repository`; where there is none, the one that an installed wheel brings along."""
    here, shipped = Path("model_repository"), Path(__file__).parent / "model_repository"
    return shipped if shipped.is_dir() and not here.is_dir() else here


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_manifest(bundle: Path) -> Manifest:
    """Read and check `bundle/encoder.json` against the folder's name and the bytes of `1/model.onnx`.

    Raises:
        BundleError: a file is missing, the JSON does not fit the schema, or the name or the sha256 differs.
    """
    manifest = _told(bundle)
    _require(manifest, bundle, sha256_of(bundle / "1" / "model.onnx"))
    return manifest


def read_bundle(bundle: Path) -> tuple[Manifest, bytes]:
    """The same, and the bytes of `1/model.onnx` that were checked: of a bundle that is replaced while it is read there
    is an error, never one encoder's manifest with another one's graph."""
    manifest = _told(bundle)
    graph = (bundle / "1" / "model.onnx").read_bytes()
    _require(manifest, bundle, hashlib.sha256(graph).hexdigest())
    return manifest, graph


def _told(bundle: Path) -> Manifest:
    path, model = bundle / "encoder.json", bundle / "1" / "model.onnx"
    for needed in (path, model):
        if not needed.is_file():
            raise BundleError(f"{bundle.name}: {needed.relative_to(bundle)} is missing; export the encoder again")
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise BundleError(f"{path}: {where}: {first['msg']}") from error
    if manifest.name != bundle.name:
        raise BundleError(f"{path}: names {manifest.name!r}, but its folder is {bundle.name!r}")
    return manifest


def _require(manifest: Manifest, bundle: Path, actual: str) -> None:
    if actual != manifest.sha256:
        model = bundle / "1" / "model.onnx"
        raise BundleError(f"{model}: sha256 is {actual}, encoder.json says {manifest.sha256}; the file was changed")
