"""Whitening against scikit-learn's PCA and its own definition; in the graph as in torch."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from sklearn.decomposition import PCA
from torch import Generator, Tensor

from patchsight_export.__main__ import main
from patchsight_export.verify import noise
from patchsight_export.whitening import Whitening, learn_whitening
from patchsight_serve.errors import InvalidRequest
from patchsight_serve.nearest import normalize
from patchsight_serve.ort_encoder import OrtEncoder
from patchsight_serve.sample_gallery import SAMPLES
from patchsight_train.objective import Objective
from patchsight_train.views import eval_view


def embeddings(N: int = 400, D: int = 6) -> Tensor:
    """Of which a few directions hold most, far from the origin."""
    rng = Generator().manual_seed(0)
    return torch.randn(N, D, generator=rng) @ torch.randn(D, D, generator=rng) * torch.logspace(0, -2, D) + 3


def test_without_shrinkage_all_directions_are_equally_long() -> None:
    x = embeddings()
    y = Whitening.learned(x, 0.0)(x)
    torch.testing.assert_close(y.mean(dim=0), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cov(y.T), torch.eye(6), atol=1e-3, rtol=0)


def test_it_is_pca_s_whitening_turned_back() -> None:
    x = embeddings()
    unit = F.normalize(x, dim=1).double().numpy()
    pca = PCA(whiten=True).fit(unit)
    expected = pca.transform(unit) @ pca.components_
    np.testing.assert_allclose(Whitening.learned(x, 0.0)(x), expected, atol=2e-3)


def test_shrinkage_leaves_short_what_holds_next_to_nothing() -> None:
    x = embeddings()
    wide, shrunk = (torch.linalg.eigvalsh(torch.cov(Whitening.learned(x, s)(x).T)) for s in (0.0, 0.1))
    assert wide[0] > 0.99
    assert shrunk[0] < 0.5 < 0.8 < shrunk[-1] < 1


def test_cosines_of_what_all_share_are_high_and_of_the_whitened_are_not() -> None:
    x = embeddings()

    def cosines(rows: Tensor) -> Tensor:
        unit = F.normalize(rows, dim=1)
        return (unit @ unit.T)[~torch.eye(len(rows), dtype=torch.bool)]

    assert cosines(x).mean() > 0.5
    assert cosines(Whitening.learned(x)(x)).mean().abs() < 0.05


def test_too_few_or_broken_embeddings_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="takes 12 images or more, got 11"):
        Whitening.learned(embeddings(11))
    broken = embeddings()
    broken[3, 2] = torch.nan
    with pytest.raises(InvalidRequest, match="not finite"):
        Whitening.learned(broken)


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
