"""What docs/clients.md shows is run as it stands, but for the server's address."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from on_socket import on_socket

from patchsight_serve.app import create_app
from patchsight_serve.fake_encoder import FakeEncoder
from patchsight_serve.settings import ServeSettings

PAGE = Path(__file__).resolve().parents[3] / "docs" / "clients.md"
PRINTED = "http://127.0.0.1:8000"


def test_python(tmp_path: Path, png: bytes, encode: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shoes.jpg").write_bytes(png)
    (tmp_path / "dress.jpg").write_bytes(encode(np.full((8, 8, 3), 90, np.uint8)))
    encoders = {n: FakeEncoder(n, embedding_dim=d) for n, d in (("simclr-vit-tiny-photos", 16), ("another", 8))}
    settings = ServeSettings(sample_gallery=False, state_dir=tmp_path, encoder="simclr-vit-tiny-photos")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    seen: dict[str, object] = {}
    with on_socket(create_app(encoders, settings), "critical") as url:
        for block in blocks:
            exec(compile(block.replace(PRINTED, url), str(PAGE), "exec"), seen)
            if "nearest" in seen:
                assert [n.id for n in seen.pop("nearest")][0] == "shoes-1"  # type: ignore[attr-defined]
            if "embeddings" in seen:
                same = seen["vectors"][0] == seen["vector"] == seen["reply"].data[0].embedding  # type: ignore
                assert same
                seen.pop("embeddings")
    assert seen["vectors"].shape == (2, 16)  # type: ignore[attr-defined]
    assert sorted(seen["frame"]["metadata"].map(str)) == ["{'year': 2010}", "{}"]  # type: ignore[index]
