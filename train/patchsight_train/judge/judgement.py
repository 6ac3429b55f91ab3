"""Everything that is measured of one subject, as plain numbers for result.json; `sheets` draws what they came from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor

from patchsight_serve.labelled import match_names
from patchsight_serve.nearest import normalize
from patchsight_serve.protocol import Figures, evaluate, few_shot, wilson
from patchsight_train.data import draw
from patchsight_train.encoder import Encoder
from patchsight_train.judge import robustness
from patchsight_train.judge.confusion import confusion
from patchsight_train.judge.dimension import intrinsic_dimension
from patchsight_train.judge.features import features
from patchsight_train.judge.heads import Probed, probe_heads, steps_for
from patchsight_train.judge.robustness import Robustness
from patchsight_train.judge.settings import EvalSettings
from patchsight_train.judge.subject import Subject
from patchsight_train.judge.units import class_information, off_diagonal_correlation
from patchsight_train.quality import feature_std, rankme, uniformity
from patchsight_train.whitening import Whitening

SAMPLE = 4096  # test images that the label-free measures look at
DISTURBED = 1000  # test images that are disturbed, against at most `GALLERY` training images
GALLERY = 10_000


@dataclass(frozen=True)
class Judgement:
    """figures: k-NN by kind of embedding. disturbed: robustness; empty without pictures or
    encoder. numbers: all of it for result.json."""

    subject: Subject
    figures: dict[str, Figures]
    disturbed: list[Robustness]
    numbers: dict[str, Any]

    @property
    def headline(self) -> Figures:
        return self.figures[self.subject.recommended]

    @property
    def predicted(self) -> Tensor:
        """Classes of the test images by the headline's vote, int64 `(Q,)`."""
        return torch.from_numpy(self.headline.predictions[self.headline.headline])

    @property
    def confusion(self) -> Tensor:
        """int64 `(C, C)`: true classes in rows, predicted ones in columns."""
        return confusion(self.subject.test.labels, self.predicted, len(self.subject.class_names))


def judge(subject: Subject, settings: EvalSettings, device: torch.device, progress: Progress) -> Judgement:
    """Raises InvalidRequest where the gallery leaves no neighbor, or names do not tell which image is which."""
    train, test = subject.train, subject.test
    own = match_names(train.names, test.names) if settings.skip_self else None
    figures: dict[str, Figures] = {}
    for kind in (kind for kind in train.kinds if not kind.startswith("last ")):
        task = progress.add_task(f"{subject.name}: k-NN, {kind}", total=len(test))
        figures[kind] = evaluate(*_vectors(subject, kind), lambda n, task=task: progress.advance(task, n), own)  # type: ignore[misc]
    vectors = _vectors(subject, subject.recommended)
    few = [few_shot(*vectors, shots, settings.draws, settings.seed, own) for shots in settings.shots]
    task = progress.add_task(f"{subject.name}: linear heads", total=steps_for(len(train), len(train.kinds)))
    probed = probe_heads(
        train.kinds, train.labels, test.kinds, test.labels, seed=settings.seed, done=lambda n: progress.advance(task, n)
    )
    disturbed = disturb(subject, device, progress)
    numbers = {
        "name": subject.name, "recommended": subject.recommended, "about": subject.about,
        "train": _side(train), "test": _side(test),
        "classes_only_in_test": [subject.class_names[c] for c in _only_in_test(train.labels, test.labels)],
        "knn": {kind: _knn(found, len(test)) for kind, found in figures.items()},
        "few_shot": [
            {"shots": f.shots, "accuracy": float(np.mean(f.accuracy)), "draws": f.accuracy} for f in few
        ],
        "linear": _linear(probed, len(test)),
        "representation": representation(test.kinds[subject.recommended], test.labels),
        "robustness": [vars(row) for row in disturbed],
    }  # fmt: skip
    return Judgement(subject, figures, disturbed, numbers)


def representation(z: Tensor, labels: Tensor) -> dict[str, float]:
    """What the embeddings `(N, D)` of the test images are like: compact, evenly spread, disentangled."""

    some = draw(torch.arange(len(z)), SAMPLE)
    z, labels = z[some], labels[some]
    information = class_information(z, labels)
    return {
        "images": len(z),
        "dimensions": z.shape[1],
        "rankme": rankme(z),
        "intrinsic_dimension": intrinsic_dimension(F.normalize(z, dim=1)),
        "uniformity": uniformity(z) if len(z) > 1 else float("nan"),
        "feature_std": feature_std(z),
        "off_diagonal_correlation": off_diagonal_correlation(z),
        "information_mean": float(information.mean()),
        "information_max": float(information.max()),
    }


def disturb(subject: Subject, device: torch.device, progress: Progress) -> list[Robustness]:
    """The recommended embedding under every perturbation of the first test images."""
    encoder, pictures = subject.encoder, subject.test_pictures
    if encoder is None or pictures is None:
        return []
    train, test = subject.train, subject.test
    some = draw(torch.arange(len(train)), GALLERY)
    gallery = F.normalize(train.kinds[subject.recommended][some], dim=1)
    count = min(len(test), DISTURBED)
    pixels = pictures[range(count)]
    task = progress.add_task(f"{subject.name}: disturbed pictures", total=len(robustness.PERTURBATIONS) + 1)
    embed = embedding_of(encoder, subject.recommended, subject.whitening, device)
    return robustness.measure(
        embed, gallery, train.labels[some], pixels, test.labels[:count], done=lambda: progress.advance(task)
    )


def embedding_of(
    encoder: Encoder, kind: str, whitening: Mapping[str, Whitening], device: torch.device
) -> Callable[[Tensor], Tensor]:
    """uint8 `(N, 3, S, S)` to one kind of embedding, L2-normalized float32 `(N, D)` on the CPU."""

    def embed(pixels: Tensor) -> Tensor:
        parts = [features(encoder, part.to(device), whitening)[kind] for part in torch.split(pixels, 128)]
        return F.normalize(torch.cat(parts), dim=1)

    return embed


def _vectors(subject: Subject, kind: str) -> tuple[Any, Any, Any, Any]:
    """Gallery, its labels, queries, their labels, as the protocol takes them."""
    train, test = subject.train, subject.test
    return (
        normalize(train.kinds[kind].numpy()), train.labels.numpy(), normalize(test.kinds[kind].numpy()),
        test.labels.numpy(),
    )  # fmt: skip


def _only_in_test(train: Tensor, test: Tensor) -> list[int]:
    return sorted(set(test.tolist()) - set(train.tolist()))


def _side(side: Any) -> dict[str, Any]:
    return {"images": len(side), "skipped": [{"name": name, "reason": reason} for name, reason in side.skipped]}


def _knn(found: Figures, queries: int) -> dict[str, Any]:
    interval = {str(k): wilson(round(share * queries), queries) for k, share in found.accuracy.items()}
    return {
        "accuracy": {str(k): share for k, share in found.accuracy.items()},
        "interval_95": interval,
        "headline_k": found.headline,
    }


def _linear(probed: Probed, queries: int) -> dict[str, Any]:
    best = probed.best
    return {
        "heads": [vars(tried) for tried in probed.heads],
        "best": vars(best) | {"interval_95": wilson(round(best.test * queries), queries)},
        "folding_error": probed.folding_error,
    }
