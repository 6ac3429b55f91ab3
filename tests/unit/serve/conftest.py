"""Pictures in all their encodings, a tiny encoder bundle made of a few ONNX nodes, and a running application."""

import io
import json
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from starlette.testclient import TestClient

from patchsight_serve.app import create_app
from patchsight_serve.encoder import Encoder
from patchsight_serve.fake_encoder import FakeEncoder
from patchsight_serve.manifest import METADATA_KEY, Manifest, Transform, sha256_of
from patchsight_serve.settings import PREFIX, ServeSettings

if TYPE_CHECKING:
    from patchsight_serve.milvus_galleries import MilvusGalleries


@pytest.fixture(scope="session")
def picture() -> np.ndarray:
    """uint8 `(48, 64, 3)`: smooth, and without any symmetry that a wrong flip or turn could hide behind."""
    y, x = np.mgrid[:48, :64]
    return np.stack([4 * x, 5 * y, 2 * x + y], axis=2).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """`encode(array or image, "PNG", **options)`: the file's bytes."""

    def encode(image: Any, format: str = "PNG", **options: Any) -> bytes:
        file = io.BytesIO()
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, format, **options)
        return file.getvalue()

    return encode


@pytest.fixture(scope="session")
def png(picture: np.ndarray, encode: Callable[..., bytes]) -> bytes:
    """The picture as a PNG."""
    return encode(picture)


@pytest.fixture(scope="session")
def bad_images(png: bytes, picture: np.ndarray, encode: Callable[..., bytes]) -> dict[str, tuple[bytes, int, str]]:
    """By name: bytes, and the status and code they are answered with."""
    jpeg = encode(picture, "JPEG")
    huge = bytearray(png)
    huge[16:24] = (50_000).to_bytes(4, "big") * 2  # IHDR's width and height
    huge[29:33] = __import__("zlib").crc32(bytes(huge[12:29])).to_bytes(4, "big")
    return {
        "empty": (b"", 400, "invalid_request"),
        "text": (b"this is a text, whatever its name ends with", 415, "unsupported_image"),
        "truncated": (jpeg[: len(jpeg) // 2], 422, "damaged_image"),
        "bomb": (bytes(huge), 413, "too_large"),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "unsupported_image"),
    }


@pytest.fixture(scope="session")
def odd_images(picture: np.ndarray, encode: Callable[..., bytes]) -> dict[str, bytes]:
    """Images that are unusual and good."""
    rgb = Image.fromarray(picture)
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [rgb, rgb.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    palette = rgb.quantize(16)
    return {
        "cmyk": encode(rgb.convert("CMYK"), "JPEG"),
        "gray 16": encode(picture[..., 0].astype(np.uint16) * 257),
        "palette with transparency": encode(palette, transparency=3),
        "exif": encode(rgb, "JPEG", exif=exif),
        "animated gif": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated webp": encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True),
        "1 x 1": encode(picture[5:6, 5:6]),
        "avif": encode(rgb, "AVIF"),
        "bmp": encode(rgb, "BMP"),
        "tiff": encode(rgb, "TIFF"),
    }


# The tiny encoder: patches through one convolution, and what a ViT's outputs are made of in one node each.
TINY_SIZE, TINY_PATCH, TINY_DIM, TINY_HEADS = 16, 4, 8, 2


def tiny_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {
        "mean": np.array([0.5, 0.4, 0.3], np.float32),
        "std": np.array([0.2, 0.25, 0.3], np.float32),
        "patch": rng.normal(size=(TINY_DIM, 3, TINY_PATCH, TINY_PATCH)).astype(np.float32),
        "head": rng.normal(size=(TINY_HEADS, TINY_DIM, 1, 1)).astype(np.float32),
        "cls": rng.normal(size=(TINY_DIM, TINY_DIM)).astype(np.float32),
    }


def _tiny_graph() -> onnx.ModelProto:
    side = TINY_SIZE // TINY_PATCH
    constants = tiny_weights() | {
        "255": np.array(255.0, np.float32),
        "flat": np.array([0, TINY_HEADS, -1], np.int64),
        "square": np.array([0, TINY_HEADS, side, side], np.int64),
        "share": np.array(0.9, np.float32),
        "axes": np.array([1, 2], np.int64),
    }
    node = helper.make_node
    nodes = [
        node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        node("Div", ["float", "255"], ["unit"]),
        node("Sub", ["unit", "mean"], ["centered"]),
        node("Div", ["centered", "std"], ["normal"]),
        node("Transpose", ["normal"], ["nchw"], perm=[0, 3, 1, 2]),
        node("Conv", ["nchw", "patch"], ["grid"], strides=[TINY_PATCH, TINY_PATCH]),
        node("Transpose", ["grid"], ["patch_tokens"], perm=[0, 2, 3, 1]),
        node("ReduceMean", ["patch_tokens", "axes"], ["mean_embedding"], keepdims=0),
        node("MatMul", ["mean_embedding", "cls"], ["cls_embedding"]),
        node("Conv", ["grid", "head"], ["logits"]),
        node("Reshape", ["logits", "flat"], ["flat_logits"]),
        node("Softmax", ["flat_logits"], ["softmax"], axis=-1),
        node("Mul", ["softmax", "share"], ["scaled"]),
        node("Reshape", ["scaled", "square"], ["attention"]),
    ]
    info = helper.make_tensor_value_info
    shapes = {
        "cls_embedding": [TINY_DIM],
        "mean_embedding": [TINY_DIM],
        "attention": [TINY_HEADS, side, side],
        "patch_tokens": [side, side, TINY_DIM],
    }
    graph = helper.make_graph(
        nodes,
        "tiny",
        [info("image", TensorProto.UINT8, ["N", TINY_SIZE, TINY_SIZE, 3])],
        [info(name, TensorProto.FLOAT, ["N", *shape]) for name, shape in shapes.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def _mean_alone(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph as a ResNet has it: the mean of the cells, and nothing else."""
    return onnx.utils.Extractor(model).extract_model(["image"], ["mean_embedding"])


def write_bundle(folder: Path, **changes: Any) -> Path:
    """A bundle of the tiny encoder in `folder`; `changes` are keys of the manifest that differ."""
    (folder / "1").mkdir(parents=True)
    fields: dict[str, Any] = {
        "name": folder.name, "sha256": "0" * 64, "objective": "none", "architecture": "tiny", "parameters": 1000,
        "image_size": TINY_SIZE, "patch_size": TINY_PATCH, "embedding_dim": TINY_DIM, "num_heads": TINY_HEADS,
        "prefix_tokens": 1, "recommended": "cls", "transform": Transform(resize=TINY_SIZE, crop=TINY_SIZE),
        "data": "none", "recipe": "none", "commit": "none", "license": "CC0-1.0",
    }  # fmt: skip
    manifest = Manifest(**fields | changes)
    model = _tiny_graph() if manifest.patch_size else _mean_alone(_tiny_graph())
    helper.set_model_props(model, {METADATA_KEY: manifest.metadata()})
    onnx.checker.check_model(model)
    path = folder / "1" / "model.onnx"
    path.write_bytes(model.SerializeToString())
    manifest = manifest.model_copy(update={"sha256": sha256_of(path)})
    (folder / "encoder.json").write_text(manifest.model_dump_json())
    return folder


@pytest.fixture(scope="session")
def make_bundle() -> Callable[..., Path]:
    """`make_bundle(folder, **manifest keys)`: a bundle of the tiny encoder; without a patch size, of its mean alone."""
    return write_bundle


def rewrite_graph(bundle: Path, change: Callable[[onnx.ModelProto], object]) -> Path:
    """Change the graph, and correct encoder.json's sha256, so that only the graph itself can be blamed."""
    path = bundle / "1" / "model.onnx"
    model = onnx.load(path)
    change(model)
    path.write_bytes(model.SerializeToString())
    told = json.loads((bundle / "encoder.json").read_text())
    (bundle / "encoder.json").write_text(json.dumps(told | {"sha256": sha256_of(path)}))
    return bundle


@pytest.fixture(scope="session")
def rewrite() -> Callable[[Path, Callable[[onnx.ModelProto], object]], Path]:
    """`rewrite(bundle, change)`: see `rewrite_graph`."""
    return rewrite_graph


@pytest.fixture(scope="session")
def until() -> Callable[[Callable[[], object]], None]:
    """`until(condition)`: waits for up to a minute."""

    def until(condition: Callable[[], object]) -> None:
        for _ in range(1200):
            if condition():
                return
            time.sleep(0.05)
        raise AssertionError("it never came true")

    return until


@pytest.fixture(scope="module")
def strict_serve(shared_serve: Callable[..., str], tiny_bundle: Path) -> Callable[[int, int, int], str]:
    """`strict_serve(seconds for a head, seconds for the rest, connections)`: a real server with such limits."""

    def serve(header_timeout_s: int, timeout_s: int, connections: int) -> str:
        return shared_serve(
            "--model-repository", tiny_bundle.parent, "--threads", 1, "--no-sample-gallery", "--drain-delay-s", 0,
            "--header-timeout-s", header_timeout_s, "--timeout-s", timeout_s, "--max-connections", connections,
        )  # fmt: skip

    return serve


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle `model_repository/tiny`, for reading only: 16 px, patch 4, 2 heads, 8 dimensions, all four outputs."""
    return write_bundle(tmp_path_factory.mktemp("model_repository") / "tiny")


@pytest.fixture(scope="session")
def mean_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle `model_repository/resnet`, for reading only: as `tiny_bundle`, with `mean_embedding` alone."""
    return write_bundle(
        tmp_path_factory.mktemp("model_repository") / "resnet", patch_size=None, num_heads=None, prefix_tokens=0,
        recommended="mean", architecture="tiny ResNet",
    )  # fmt: skip


@pytest.fixture(scope="session")
def milvus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one milvus-lite for all tests, which takes seconds to start; each test has names of its own in it."""
    return tmp_path_factory.mktemp("milvus") / "lite.db"


@pytest.fixture
def empty_milvus(milvus_file: Path, tmp_path: Path) -> Iterator[Path]:
    """That file, without the galleries that a test has made in it."""
    from patchsight_serve.milvus_galleries import MilvusGalleries

    yield milvus_file
    galleries = MilvusGalleries(str(milvus_file), PREFIX, "", tmp_path / "scratch")
    for name in galleries.names():
        galleries._binding(name).remove()
    galleries.close()


@pytest.fixture
def on_milvus(milvus_file: Path, tmp_path: Path) -> Iterator[Callable[[], "MilvusGalleries"]]:
    """`on_milvus()`: all galleries of this test, anew for each call as if another gateway had opened them."""
    prefix, opened = f"t{secrets.token_hex(4)}", []

    def open_galleries() -> "MilvusGalleries":
        from patchsight_serve.milvus_galleries import MilvusGalleries

        opened.append(MilvusGalleries(str(milvus_file), prefix, "", tmp_path / "scratch"))
        return opened[-1]

    yield open_galleries
    for galleries in opened:
        galleries.close()


@pytest.fixture
def serving() -> Iterator[Callable[..., TestClient]]:
    """`serving(encoder, …, **settings)`: a client of a running application, a FakeEncoder if none is given, and no
    sample gallery unless asked for."""
    clients: list[TestClient] = []

    def serving(*encoders: Encoder, **settings: Any) -> TestClient:
        loaded = encoders or (FakeEncoder(),)
        app = create_app({e.manifest.name: e for e in loaded}, ServeSettings(**{"sample_gallery": False, **settings}))
        client = TestClient(app, raise_server_exceptions=False)
        client.__enter__()
        clients.append(client)
        return client

    yield serving
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def client(serving: Callable[..., TestClient]) -> TestClient:
    """A client of an application with one FakeEncoder and default settings."""
    return serving()
