import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from patchsight_serve.dataset import read_dataset
from patchsight_serve.decode import decode
from patchsight_serve.errors import InvalidRequest
from patchsight_serve.manifest import Transform
from patchsight_serve.sample_gallery import SAMPLES
from patchsight_train.teacher import Teacher
from patchsight_train.teacher_classes import learn_classes

BUNDLE = Path(__file__).resolve().parents[3] / "model_repository" / "simclr-vit-cifar10"


@pytest.fixture
def teacher() -> Teacher:
    return Teacher(BUNDLE, torch.device("cpu"))


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_probabilities_are_those_of_scikit_learn(teacher: Teacher, console: Console) -> None:
    W, b = learn_classes(teacher, [str(SAMPLES)], None, console)
    assert W.shape == (10, 128)
    assert b.shape == (10,)
    assert W.dtype == b.dtype == torch.float32
    dataset = read_dataset(SAMPLES)
    assert dataset.labels is not None
    pixels = np.stack([decode(dataset.read(i), teacher.manifest.transform) for i in range(len(dataset))])
    x = teacher.embed(torch.from_numpy(pixels))
    scaled = StandardScaler().fit_transform(x.double().numpy())
    oracle = LogisticRegression(C=1.0, tol=1e-8, max_iter=5_000).fit(scaled, dataset.labels)
    found = (x @ W.T + b).softmax(dim=1)
    np.testing.assert_allclose(found.numpy(), oracle.predict_proba(scaled), atol=0.01)
    assert "simclr-vit-cifar10 learned 10 classes from 200 labelled images" in said(console)


def test_always_the_same(teacher: Teacher, console: Console) -> None:
    first, again = (learn_classes(teacher, [str(SAMPLES)], None, console) for _ in range(2))
    assert all(map(torch.equal, first, again))


def test_images_are_decoded_by_the_teachers_own_transform(teacher: Teacher, console: Console, tmp_path: Path) -> None:
    """A teacher that cuts the center out of a larger picture never sees the border."""
    rng = np.random.default_rng(1)
    for i in range(8):
        picture = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        for name in ("bare", "framed"):
            if name == "framed":
                picture[:12] = picture[-12:] = picture[:, :12] = picture[:, -12:] = 0
            folder = tmp_path / name / f"class{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(folder / f"{i}.png")
    teacher.manifest = teacher.manifest.model_copy(update={"transform": Transform(resize=64, crop=32)})
    bare, framed = (learn_classes(teacher, [str(tmp_path / name)], None, console) for name in ("bare", "framed"))
    assert all(map(torch.equal, bare, framed))


def test_unreadable_images_are_reported_and_left_out(teacher: Teacher, console: Console, picture_folder: Path) -> None:
    expected = learn_classes(teacher, [str(picture_folder)], None, console)
    (picture_folder / "cats" / "03x.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    found = learn_classes(teacher, [str(picture_folder)], None, console)
    assert all(map(torch.equal, found, expected))
    assert "skipped cats/03x.png" in said(console)
    assert "learned 2 classes from 12 labelled images" in said(console)


def test_images_without_labels_play_no_part(
    teacher: Teacher, console: Console, picture_folder: Path, tmp_path: Path
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8)).save(flat / "black.png")
    expected = learn_classes(teacher, [str(picture_folder)], None, console)
    found = learn_classes(teacher, [str(flat), str(picture_folder)], None, console)
    assert all(map(torch.equal, found, expected))


def test_a_limit_counts_images(teacher: Teacher, console: Console) -> None:
    learn_classes(teacher, [str(SAMPLES)], 57, console)
    assert "from 57 labelled images" in said(console)


def test_no_labels_are_an_error_that_says_what_to_do(teacher: Teacher, console: Console, picture_folder: Path) -> None:
    cats = picture_folder / "cats"
    with pytest.raises(InvalidRequest, match=r"cats: no labels.* --teacher-labels, or use distillation"):
        learn_classes(teacher, [str(cats)], None, console)


def test_one_class_is_an_error(teacher: Teacher, console: Console, picture_folder: Path) -> None:
    for path in (picture_folder / "dogs").iterdir():
        path.unlink()
    with pytest.raises(InvalidRequest, match="all labelled images are of one class"):
        learn_classes(teacher, [str(picture_folder)], None, console)
