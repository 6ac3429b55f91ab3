"""The command: images in, Parquet out, and k-NN from that as from the images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchsight_serve import embed, knn
from patchsight_serve import sources as sources_module
from patchsight_serve.dataset import Dataset, read_dataset
from patchsight_serve.embedder import LocalEmbedder
from patchsight_serve.embedding_file import read_embeddings
from patchsight_serve.ort_encoder import OrtEncoder
from patchsight_serve.sample_gallery import SAMPLES


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders of sample photos; in the first one cannot be read."""
    samples = read_dataset(SAMPLES)
    assert samples.labels is not None
    assert samples.class_names is not None
    for i in range(60):
        folder = tmp_path / ("train" if i % 3 else "test") / samples.class_names[samples.labels[i]]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:03}.jpg").write_bytes(samples.read(i))
    (tmp_path / "train" / "dress" / "bad.jpg").write_text("a text")
    return tmp_path / "train", tmp_path / "test"


def run(*arguments: object) -> None:
    embed.main([str(argument) for argument in arguments])


def skipped_of(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(f"{out}.skipped.jsonl").read_text().splitlines()]


def test_embeddings_are_those_of_the_encoder_and_what_is_broken_is_listed(
    sources: tuple[Path, Path], tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "e.parquet"
    run(sources[0], "--out", out, "--model-repository", tiny_bundle.parent, "--output", "mean")
    printed = capsys.readouterr()
    assert printed.out == f"{out}: 40 embeddings of tiny (mean)\n"
    assert f"1 of 41 images were left out: see {out}.skipped.jsonl\n" in printed.err
    (line,) = skipped_of(out)
    assert line["name"] == "dress/bad.jpg"
    assert "not an image" in line["reason"]
    assert not list(tmp_path.glob("*.journal*"))
    dataset, found = read_dataset(sources[0]), read_embeddings(out)
    local = LocalEmbedder(OrtEncoder(tiny_bundle, 1), "mean")
    assert found.encoder == local.encoder
    good = [i for i, name in enumerate(dataset.names) if not name.endswith("bad.jpg")]
    assert found.names == [dataset.names[i] for i in good]
    expected = np.stack([row for row in local.embed_each(dataset.read(i) for i in good) if isinstance(row, np.ndarray)])
    np.testing.assert_allclose(found.vectors, expected, rtol=1e-5, atol=1e-6)
    assert found.labels is not None
    assert dataset.labels is not None
    assert found.labels.tolist() == dataset.labels[good].tolist()


def test_a_file_that_is_gone_costs_itself_alone(
    sources: tuple[Path, Path], tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    gone = sources[1] / read_dataset(sources[1]).names[3]

    def then_it_vanishes(source: str) -> Dataset:
        dataset = read_dataset(source)
        gone.unlink()
        return dataset

    monkeypatch.setattr(sources_module, "read_dataset", then_it_vanishes)
    run(sources[1], "--out", tmp_path / "e.parquet", "--model-repository", tiny_bundle.parent)
    printed = capsys.readouterr()
    assert "19 embeddings" in printed.out
    (line,) = skipped_of(tmp_path / "e.parquet")
    assert line["name"] == str(gone.relative_to(sources[1]))
    assert "[Errno 2] No such file" in line["reason"]


def test_neighbors_of_embeddings_are_those_of_the_images(
    sources: tuple[Path, Path], tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def report(*arguments: object) -> dict[str, Any]:
        knn.main([str(argument) for argument in arguments])
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    files = [tmp_path / f"{source.name}.parquet" for source in sources]
    for source, file in zip(sources, files, strict=True):
        run(source, "--out", file, "--model-repository", tiny_bundle.parent)
    capsys.readouterr()
    from_files = report("--train", files[0], "--test", files[1], "--json")
    direct = report("--train", sources[0], "--test", sources[1], "--json", "--model-repository", tiny_bundle.parent)
    for key in ("protocol", "encoder", "accuracy", "headline", "classes", "classes_only_in_test"):
        assert from_files[key] == direct[key]


def test_embeddings_of_two_outputs_are_not_compared(
    sources: tuple[Path, Path], tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for source, output in zip(sources, ("cls", "mean"), strict=True):
        run(
            source, "--out", tmp_path / f"{output}.parquet", "--output", output,
            "--model-repository", tiny_bundle.parent,
        )  # fmt: skip
    for test, message in ((tmp_path / "mean.parquet", "different encoders"), (sources[1], "one holds embeddings")):
        with pytest.raises(SystemExit) as exit:
            knn.main(["--train", str(tmp_path / "cls.parquet"), "--test", str(test)])
        assert exit.value.code == 1
        assert message in capsys.readouterr().err


def test_what_cannot_work_leaves_no_file(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_text("a text")
    for data, message in (("nowhere", "no such folder"), (tmp_path / "bad", "none of 1 images can be embedded; a.jpg")):
        with pytest.raises(SystemExit) as exit:
            run(data, "--out", tmp_path / "e.parquet", "--model-repository", tiny_bundle.parent)
        assert exit.value.code == 1
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("*e.parquet*")] == ["e.parquet.skipped.jsonl"]
    assert [line["name"] for line in skipped_of(tmp_path / "e.parquet")] == ["a.jpg"]
