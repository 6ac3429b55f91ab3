"""What a request may ask of an encoder: the public names, and what its graph calls them."""

import numpy as np

from patchsight_serve.encoder import Values
from patchsight_serve.errors import InvalidRequest
from patchsight_serve.manifest import Manifest

# What a request may ask for, in the order of the replies, and what the graph calls it. `embedding` is the one that the
# encoder's manifest recommends.
OUTPUTS = {
    "embedding": None,
    "cls": "cls_embedding",
    "mean": "mean_embedding",
    "both": "both_embedding",
    "attention": "attention",
    "patch_tokens": "patch_tokens",
}
_LEAST = np.finfo(np.float32).tiny  # in place of 0
VECTORS = ("embedding", "cls", "mean", "both")


def available(manifest: Manifest) -> dict[str, str]:
    """The public outputs that this encoder has, and what its graph calls them."""
    names = {output: _graph_name(output, manifest) for output in OUTPUTS}
    return {output: name for output, name in names.items() if name in manifest.outputs}


def graph_name(output: str, manifest: Manifest, param: str = "outputs") -> str:
    """The graph's name of a public output. Raises InvalidRequest, which blames `param`, if the encoder lacks it."""
    if output not in OUTPUTS:
        raise InvalidRequest(f"unknown output {output!r}; the outputs are {', '.join(OUTPUTS)}", param)
    name = _graph_name(output, manifest)
    if name not in manifest.outputs:
        there = ", ".join(available(manifest))
        raise InvalidRequest(
            f"encoder {manifest.name!r} ({manifest.architecture}) has no output {output!r}; it has {there}", param
        )
    return name


def _graph_name(output: str, manifest: Manifest) -> str:
    return OUTPUTS[output] or f"{manifest.recommended}_embedding"


def to_unit_length(vectors: Values) -> Values:
    """`(..., D)` to length 1 along the last axis; a vector of zeros stays one."""
    # As np.linalg.norm has it, bit for bit, in half the time.
    length: Values = np.sqrt(np.add.reduce(vectors * vectors, axis=-1, keepdims=True))
    np.maximum(length, _LEAST, out=length)
    unit: Values = vectors / length
    return unit
