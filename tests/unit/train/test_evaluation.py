import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from patchsight_train.build import build
from patchsight_train.data import Images
from patchsight_train.evaluation import Evaluation, cls_attention, encoder_view, undisturbed
from patchsight_train.linear import linear_probe
from patchsight_train.objective import Objective
from patchsight_train.probe import Probe, embed
from patchsight_train.quality import alignment, feature_std, rankme, uniformity
from patchsight_train.randomness import Randomness
from patchsight_train.settings import TrainSettings
from patchsight_train.update import Updater
from patchsight_train.views import eval_view
from patchsight_train.vit import ViT

CPU = torch.device("cpu")
RESNET: dict[str, Any] = {"backbone": "resnet18", "width": None, "depth": None, "heads": None, "patch_size": 4}
DRAWN = {
    "mae": {"views", "reconstructions", "attention", "neighbors"},
    "autoencoder": {"views", "reconstructions", "attention", "neighbors"},
    "simclr": {"views", "attention", "neighbors"},
    "dino": {"views", "attention", "neighbors"},
}


def some(images: Images, rows: slice, size: int = 16) -> Images:
    """Photos, shrunk so that a tiny encoder takes them."""
    assert images.labels is not None
    small = F.interpolate(images.pixels[rows].float(), size=(size, size), mode="area").round().byte()
    return Images(small, images.labels[rows], images.class_names)


@pytest.fixture
def evaluation(photos: Images, tmp_path: Path) -> Evaluation:
    probe = Probe(some(photos, slice(30, 130)), some(photos, slice(130, 190)))
    return Evaluation(some(photos, slice(0, 30)), probe, tmp_path)


@pytest.mark.parametrize("name", ["simclr", "mae"])
def test_measures_are_those_of_the_kept_encoder(
    name: str, objective: Callable[..., Objective], evaluation: Evaluation
) -> None:
    model = objective(name)
    found = evaluation.measure(model, CPU)
    encoder, pooling, pixels = model.kept.eval(), model.pooling, evaluation.sample.pixels
    z = encoder.pooled(eval_view(pixels), pooling).detach()
    expected = {"rankme": rankme(z), "uniformity": uniformity(z), "feature_std": feature_std(z)}
    random = Randomness(Generator().manual_seed(0))
    pair = [encoder.pooled(model.views(pixels, random)[0], pooling).detach() for _ in range(2)]
    expected["alignment"] = alignment(*pair)
    probe = evaluation.probe
    assert probe is not None
    expected["knn"] = probe.accuracy(encoder, pooling, CPU)
    gallery, queries = (embed(encoder, side.pixels, pooling, CPU) for side in (probe.gallery, probe.queries))
    expected["linear_probe"] = linear_probe(gallery, probe.gallery.labels, queries, probe.queries.labels)
    assert found == pytest.approx(expected, rel=1e-4)
    assert 0 < found["alignment"] < 4


def test_a_run_is_the_same_with_and_without_evaluation(
    settings: Callable[..., TrainSettings], evaluation: Evaluation, random_pixels: Tensor
) -> None:
    """Bit for bit: parameters, batch-norm statistics, optimizer; of the objective with the most state."""

    def trained(evaluated: bool) -> Updater:
        chosen = settings("dino", **RESNET)
        torch.manual_seed(0)
        updater = Updater(build(chosen), chosen, CPU, torch.float32, 10, 2)
        for step in range(3):
            updater.update(random_pixels[:8], step)
            if evaluated:
                evaluation.measure(updater.objective, CPU)
                evaluation.draw(updater.objective, CPU)
        return updater

    with_, without = trained(True), trained(False)
    state, expected = with_.objective.state_dict(), without.objective.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    moments = [u.optimizer.state_dict()["state"] for u in (with_, without)]
    assert all(torch.equal(moments[0][i]["exp_avg"], values["exp_avg"]) for i, values in moments[1].items())


@pytest.mark.parametrize("name", ["mae", "simclr", "dino", "swav", "autoencoder"])
def test_nothing_is_disturbed(name: str, objective: Callable[..., Objective], evaluation: Evaluation) -> None:
    model = objective(name)
    model.kept.train(False)  # modes differ within one objective
    before, modes, state = (
        copy.deepcopy(model.state_dict()),
        [m.training for m in model.modules()],
        torch.get_rng_state(),
    )
    first = evaluation.measure(model, CPU)
    evaluation.draw(model, CPU)
    assert evaluation.measure(model, CPU) == first
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()


def test_modes_come_back_after_an_error(objective: Callable[..., Objective]) -> None:
    model = objective("simclr")

    def fail() -> None:
        with undisturbed(model):
            assert not any(m.training for m in model.modules())
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("name", DRAWN)
def test_pictures_of_a_vit(name: str, objective: Callable[..., Objective], evaluation: Evaluation) -> None:
    evaluation.draw(objective(name), CPU)
    found = list((evaluation.run / "pictures").iterdir())
    assert {path.name for path in found} == {f"{name}.png" for name in DRAWN[name]}
    for path in found:
        with Image.open(path) as image:
            image.load()
            assert min(image.size) > 200
            assert len(image.getcolors(1_000_000) or []) > 100  # something is on it


@pytest.mark.parametrize("name", ["simclr", "autoencoder"])
def test_resnets_have_no_attention(name: str, objective: Callable[..., Objective], evaluation: Evaluation) -> None:
    model = objective(name, **RESNET)
    assert evaluation.measure(model, CPU).keys() == {
        "knn", "linear_probe", "rankme", "alignment", "uniformity", "feature_std",
    }  # fmt: skip
    evaluation.draw(model, CPU)
    assert {p.stem for p in (evaluation.run / "pictures").iterdir()} == DRAWN[name] - {"attention"}


def test_without_labels_there_is_quality_and_there_are_neighbors(
    objective: Callable[..., Objective], random_pixels: Tensor, tmp_path: Path
) -> None:
    evaluation = Evaluation(Images(random_pixels, None), None, tmp_path)
    model = objective("simclr")
    assert evaluation.measure(model, CPU).keys() == {"rankme", "alignment", "uniformity", "feature_std"}
    evaluation.draw(model, CPU)
    assert (tmp_path / "pictures" / "neighbors.png").exists()


def test_one_picture_has_no_neighbors(objective: Callable[..., Objective], evaluation: Evaluation) -> None:
    sample = evaluation.sample
    assert sample.labels is not None
    alone = Evaluation(Images(sample.pixels[:1], sample.labels[:1]), None, evaluation.run)
    alone.draw(objective("simclr"), CPU)
    assert {p.stem for p in (evaluation.run / "pictures").iterdir()} == {"views", "attention"}


def test_shown_images_are_of_different_classes() -> None:
    pixels = torch.zeros(9, 3, 16, 16, dtype=torch.uint8)
    labels = torch.tensor([2, 2, 2, 0, 2, 0, 1, -1, 5])
    several = Evaluation(Images(pixels, labels, ["a", "b", "c", "d", "e", "f"]), None, Path())
    assert several.chosen().tolist() == [0, 3, 6, 7, 8, 1]
    assert [several.name(i) for i in (0, 3, 6, 7, 8)] == ["c", "a", "b", "", "f"]
    assert Evaluation(Images(pixels, None), None, Path()).chosen().tolist() == [0, 1, 2, 3, 4, 5]
    assert Evaluation(Images(pixels, labels), None, Path()).name(8) == "5"


def test_neighbors_are_the_most_similar_others(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch, generator: Generator
) -> None:
    """What reaches the sheet, against a plain loop over the sample."""
    z = F.normalize(torch.randn(30, 4, generator=generator), dim=1)
    z[7] = z[3]  # a duplicate is a neighbor, and the image itself is not
    chosen = torch.tensor([3, 11])
    seen: list[Any] = []
    monkeypatch.setattr("patchsight_train.evaluation.neighbor_sheet", lambda *arguments: seen.extend(arguments))
    evaluation.neighbors(z, chosen)
    queries, neighbors, similarity, query_names, names = seen
    pixels = evaluation.sample.pixels
    for row, i in enumerate(chosen.tolist()):
        others = sorted((j for j in range(30) if j != i), key=lambda j: -float(z[i] @ z[j]))[:6]
        assert torch.equal(queries[row], pixels[i] / 255)
        assert torch.equal(neighbors[row], pixels[others] / 255)
        torch.testing.assert_close(similarity[row], z[others] @ z[i])
        assert [query_names[row], *names[row]] == [evaluation.name(j) for j in (i, *others)]
    assert similarity[0, 0] == pytest.approx(1)


def test_views_are_cut_from_pictures_of_the_samples_size(
    objective: Callable[..., Objective], photos: Images, tmp_path: Path
) -> None:
    """Pictures may be kept larger than the encoder's input: then they are resized as the decoder does, for its use."""
    large, small = some(photos, slice(0, 40), 32), objective("simclr")
    evaluation = Evaluation(large, None, tmp_path)
    z = small.kept.eval().pooled(encoder_view(large.pixels, 16), "cls").detach()
    assert evaluation.measure(small, CPU)["rankme"] == pytest.approx(rankme(z), rel=1e-4)
    evaluation.draw(small, CPU)


def test_resizing_is_pillows(photos: Images) -> None:
    shown = encoder_view(photos.pixels[:3], 16)
    for x, pixels in zip(shown, photos.pixels[:3], strict=True):
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((16, 16), Image.Resampling.BICUBIC)
        expected = eval_view(
            torch.tensor(list(image.tobytes()), dtype=torch.uint8).view(1, 16, 16, 3).permute(0, 3, 1, 2)
        )
        torch.testing.assert_close(x, expected[0], atol=1.5 / 255 / 0.224, rtol=0)  # one step of 255, and rounding
    assert torch.equal(encoder_view(photos.pixels, 32), eval_view(photos.pixels))


@pytest.mark.parametrize("registers", [0, 2])
def test_attention_is_from_the_cls_token_to_the_patches(
    registers: int, objective: Callable[..., Objective], random_pixels: Tensor
) -> None:
    encoder = objective("simclr", registers=registers).kept
    assert isinstance(encoder, ViT)
    x = eval_view(random_pixels[:3])
    maps = cls_attention(encoder, x)
    assert maps.shape == (3, 2, 4, 4)
    _, weights = encoder.with_attention(x)
    for y in range(4):
        for column in range(4):
            expected = weights[:, :, 0, 1 + registers + 4 * y + column]
            assert torch.equal(maps[:, :, y, column], expected)
    assert (maps.sum(dim=(2, 3)) < 1).all()
