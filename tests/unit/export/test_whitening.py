"""Whitening in the graph as in torch."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from patchsight_export.__main__ import main
from patchsight_export.whitening import learn_whitening
from patchsight_serve.nearest import normalize
from patchsight_serve.ort_encoder import OrtEncoder
from patchsight_serve.sample_gallery import SAMPLES
from patchsight_serve.trial_pictures import noise
from patchsight_train.objective import Objective
from patchsight_train.views import eval_view


@pytest.mark.parametrize(("objective", "settings"), [("simclr", {}), ("mae", {})])
def test_the_graph_whitens_both_embeddings_and_nothing_else(
    objective: str, settings: dict[str, str], make_run: Callable[..., Objective], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    made = make_run(tmp_path / "run", objective, **settings)
    for name, flags in (("plain", []), ("white", ["--whiten", str(SAMPLES)])):
        main([str(tmp_path / "run"), str(tmp_path / "repository" / name), *flags])
    plain, white = (OrtEncoder(tmp_path / "repository" / name, threads=1) for name in ("plain", "white"))
    images = noise(16, 5)
    outputs = list(plain.manifest.outputs)
    before, after = plain.run(images, outputs), white.run(images, outputs)
    for name in ("attention", "patch_tokens"):
        np.testing.assert_array_equal(before[name], after[name])
    whiten, count = learn_whitening(made.kept, str(SAMPLES), Console(quiet=True))
    assert count == 200
    x = eval_view(torch.from_numpy(images).permute(0, 3, 1, 2))
    for pooling in ("cls", "mean"):
        with torch.no_grad():
            wanted = whiten[pooling](made.kept.pooled(x, pooling)).numpy()
        found = after[f"{pooling}_embedding"]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
        assert np.abs(found - before[f"{pooling}_embedding"]).max() > 0.1
    first = white.manifest.recipe.splitlines()[0]
    assert first == "# embeddings whitened: ZCA, shrinkage 0.01, by 200 images of clothing.parquet"
    assert white.manifest.recipe.split("\n", 1)[1] == plain.manifest.recipe
    assert "one by one, photos" in capsys.readouterr().out


def test_both_embeddings_side_by_side_are_whitened_together(make_run: Callable[..., Objective], tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", "simclr")
    for name, flags in (("plain", []), ("white", ["--whiten", str(SAMPLES)])):
        main([str(tmp_path / "run"), str(tmp_path / "repository" / name), "--recommend", "both", *flags])
    plain, white = (OrtEncoder(tmp_path / "repository" / name, threads=1) for name in ("plain", "white"))
    assert plain.manifest.recommended == "both"
    images, D = noise(16, 5), plain.manifest.embedding_dim
    assert plain.manifest.outputs["both_embedding"] == (2 * D,)
    before, after = (e.run(images, ["cls_embedding", "mean_embedding", "both_embedding"]) for e in (plain, white))
    halves = [normalize(before[f"{pooling}_embedding"]) for pooling in ("cls", "mean")]
    np.testing.assert_allclose(before["both_embedding"], np.concatenate(halves, axis=1), atol=1e-5)
    whiten, _ = learn_whitening(made.kept, str(SAMPLES), Console(quiet=True), both=True)
    with torch.no_grad():
        wanted = whiten["both"](torch.from_numpy(before["both_embedding"])).numpy()
    np.testing.assert_allclose(after["both_embedding"], wanted, rtol=0, atol=1e-3 * np.abs(wanted).max())
    # Together, not each by itself: the halves are not the whitened ones.
    assert np.abs(after["both_embedding"][:, :D] - after["cls_embedding"]).max() > 0.1


def test_a_resnet_has_one_embedding_to_whiten(resnet_run: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "repository" / "white"
    with pytest.raises(SystemExit):  # 512 numbers are too many for 200 images
        main([str(resnet_run), str(pictures), "--whiten", str(SAMPLES)])
    assert not pictures.exists()
