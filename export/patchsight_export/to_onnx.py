"""From the trained module to the ONNX graph that is served."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import onnx
import torch
from onnx import helper
from torch import Tensor, nn

from patchsight_export.attention import Kind, blocks_of, from_cls
from patchsight_export.dynamic_size import TRANSLATIONS, dimensions, example_size, traceable_rotary
from patchsight_export.public_encoder import PublicViT
from patchsight_export.weights_file import first_line
from patchsight_serve.errors import BundleError
from patchsight_serve.manifest import METADATA_KEY
from patchsight_train.encoder import Encoder, side_by_side
from patchsight_train.views import eval_view
from patchsight_train.vit import ViT

OUTPUTS = ("cls_embedding", "mean_embedding", "attention", "patch_tokens")
EXAMPLE_BATCH = 2  # an axis of 1 may be taken for a constant
LARGEST_BATCH = 65_536


class ServedViT(nn.Module):
    """uint8 `(N, H, W, 3)` to `OUTPUTS`, float32: `(N, D)`, `(N, D)`, `(N, h, r, c)`, `(N, r, c, D)`; r rows and c
    columns of patches. With `both`, `(N, 2D)` after the first two: CLS and mean side by side.

    `attention` is that of a block or a rollout, from CLS to the patches: its sum is 1 less the weight on CLS and the
    registers. Without a CLS token the outputs are `mean_embedding` and `patch_tokens`.
    """

    def __init__(
        self, encoder: ViT | PublicViT, whiten: Mapping[str, nn.Module], both: bool, attention: Kind = "last"
    ) -> None:
        super().__init__()
        self.encoder, self.with_both, self.attention = encoder, both, attention
        self.cls, self.mean, self.both = (whiten.get(pooling, nn.Identity()) for pooling in ("cls", "mean", "both"))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        vit = self.encoder.config
        P, D = vit.prefix_tokens, vit.width
        rows, columns = image.shape[1] // vit.patch_size, image.shape[2] // vit.patch_size
        x = eval_view(image.permute(0, 3, 1, 2))
        if not P:
            tokens = self.encoder(x)
            return self.mean(tokens.mean(dim=1)), tokens.reshape(-1, rows, columns, D)
        tokens, weights = self.encoder.attend(x, blocks_of(self.attention, self.encoder.depth))
        patches = tokens[:, P:]
        seen = from_cls(weights, self.attention)
        attention = seen[:, :, P:].reshape(-1, seen.shape[1], rows, columns)
        cls, mean = tokens[:, 0], patches.mean(dim=1)
        both = (self.both(side_by_side(cls, mean)),) if self.with_both else ()
        return self.cls(cls), self.mean(mean), *both, attention, patches.reshape(-1, rows, columns, D)


class ServedResNet(nn.Module):
    """uint8 `(N, H, W, 3)` to `mean_embedding` alone, float32 `(N, D)`: the mean of the last map."""

    def __init__(self, encoder: Encoder, whiten: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.encoder = encoder
        self.mean = whiten.get("mean", nn.Identity())

    def forward(self, image: Tensor) -> tuple[Tensor]:
        return (self.mean(self.encoder.pooled(eval_view(image.permute(0, 3, 1, 2)), "mean")),)


def served(
    encoder: Encoder, whiten: Mapping[str, nn.Module] | None = None, both: bool = False, attention: Kind = "last"
) -> nn.Module:
    """What is exported of an encoder: a module whose outputs are those of its manifest, in that order.

    whiten: by pooling, "cls", "mean" and "both", what an embedding goes through before it leaves. both: whether that
    one is among the outputs. attention: as `attention.resolve` gives it.
    """
    if isinstance(encoder, ViT | PublicViT):
        return ServedViT(encoder, whiten or {}, both, attention)
    return ServedResNet(encoder, whiten or {})


def to_onnx(
    served: nn.Module, size: int, outputs: tuple[str, ...] = OUTPUTS, opset: int = 23, dynamic: bool = False
) -> onnx.ModelProto:
    """The graph of `served`, which takes uint8 `(batch, size, size, 3)` as `image`, with nothing in it that depends on
    the machine or the folder it was made in. dynamic: it takes `(batch, height, width, 3)`, of whole patches.

    Raises:
        BundleError: torch cannot trace it; for other sizes not every network of others can be.
    """
    axes = {0: torch.export.Dim("batch", min=1, max=LARGEST_BATCH)}
    height, width = size, size
    if dynamic:
        patch_size = _patch_size(served)
        (height, width), (axes[1], axes[2]) = example_size(patch_size), dimensions(patch_size)
    example = torch.zeros(EXAMPLE_BATCH, height, width, 3, dtype=torch.uint8)
    # Without gradients: attention on the CPU would not go through SDPA otherwise, and not become an Attention node.
    with torch.no_grad(), _quiet(), traceable_rotary(served) if dynamic else nullcontext():
        try:
            program = torch.onnx.export(
                served.eval(), (example,), dynamo=True, opset_version=opset, input_names=["image"],
                output_names=list(outputs), dynamic_shapes={"image": axes}, verbose=False,
                custom_translation_table=TRANSLATIONS if dynamic else None,
            )  # fmt: skip
        except torch.onnx.errors.OnnxExporterError as error:
            told = " for any size" if dynamic else ""
            raise BundleError(f"not published: torch cannot trace the network{told}: {first_line(error)}") from error
    assert program is not None
    model = program.model_proto
    strip(model)
    _name_axes(model)
    return model


def _patch_size(served: nn.Module) -> int | None:
    encoder = served.encoder
    assert isinstance(encoder, Encoder)
    return getattr(encoder.config, "patch_size", None)


def _name_axes(model: onnx.ModelProto) -> None:
    """`height` and `width` where the exporter has the expression they were traced as."""
    shape = model.graph.input[0].type.tensor_type.shape
    for axis, name in ((1, "height"), (2, "width")):
        if shape.dim[axis].HasField("dim_param"):
            shape.dim[axis].dim_param = name


def strip(model: onnx.ModelProto) -> None:
    """Remove what the exporter notes about where each node came from: stack traces with this machine's paths."""
    del model.metadata_props[:]
    model.ClearField("doc_string")
    _strip_graph(model.graph)
    for function in model.functions:
        del function.metadata_props[:]
        function.ClearField("doc_string")
        _strip_nodes(function)


def _strip_graph(graph: onnx.GraphProto) -> None:
    del graph.metadata_props[:]
    graph.ClearField("doc_string")
    for value in [*graph.input, *graph.output, *graph.value_info, *graph.initializer]:
        del value.metadata_props[:]
        value.ClearField("doc_string")
    _strip_nodes(graph)


def _strip_nodes(body: onnx.GraphProto | onnx.FunctionProto) -> None:
    for node in body.node:
        del node.metadata_props[:]
        node.ClearField("doc_string")
        for attribute in node.attribute:
            attribute.ClearField("doc_string")
            for inner in [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs:
                _strip_graph(inner)


def with_metadata(model: onnx.ModelProto, text: str) -> bytes:
    """The file: the graph, and the manifest's text inside it. Equal graphs and texts give equal bytes."""
    helper.set_model_props(model, {METADATA_KEY: text})
    content: bytes = model.SerializeToString(deterministic=True)
    return content


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of its own use of torch, and of torchvision's absence: neither is for us to mend."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)
