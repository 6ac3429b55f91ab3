"""What a run looks like from outside, while it trains: numbers by `measure`, pictures by `draw`.

Training is not disturbed: nothing of the objective changes, and all randomness is drawn from generators of its own,
always the same, so that two evaluations differ by the weights alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Generator, Tensor

from patchsight_train.data import Images
from patchsight_train.encoder import chunks
from patchsight_train.linear import linear_probe
from patchsight_train.objective import Objective
from patchsight_train.pictures import attention_sheet, neighbor_sheet, reconstruction_sheet, view_sheet, write_png
from patchsight_train.probe import Probe, knn_predict
from patchsight_train.quality import alignment, feature_std, rankme, uniformity
from patchsight_train.randomness import Randomness
from patchsight_train.views import denormalize, normalize
from patchsight_train.vit import ViT

K = 20  # nearest neighbors that vote
PAIRS = 512  # images whose views are compared
SHOWN, NEIGHBORS = 6, 6
BATCH = 256


@dataclass(frozen=True)
class Evaluation:
    """sample: images of the training data, of the size that views are cut from. probe: labelled ones, if there are any.
    run: the run folder, whose `pictures/` are drawn."""

    sample: Images
    probe: Probe | None
    run: Path

    def measure(self, objective: Objective, device: torch.device) -> dict[str, float]:
        """Label-free quality of the sample's embeddings; with a probe also `knn` and `linear_probe`, shares of 0..1.

        RankMe is taken of the embeddings as they are, all else of L2-normalized ones. NaN where they are not finite.
        """
        with undisturbed(objective):
            z = embeddings(objective, self.sample.pixels, device)
            values = {
                "rankme": rankme(z),
                "alignment": alignment(*self.pairs(objective, device)),
                "uniformity": uniformity(z),
                "feature_std": feature_std(z),
            }
            return self.probed(objective, device) | values

    def probed(self, objective: Objective, device: torch.device) -> dict[str, float]:
        """What `Probe.accuracy` and `linear_probe` say, from embeddings that are computed once for both."""
        if self.probe is None:
            return {}
        gallery, queries = (
            F.normalize(embeddings(objective, side.pixels, device), dim=1)
            for side in (self.probe.gallery, self.probe.queries)
        )
        labels, truth = self.probe.gallery.labels, self.probe.queries.labels
        assert labels is not None
        assert truth is not None
        predicted = knn_predict(gallery, labels, queries, min(K, len(gallery)))
        return {
            "knn": (predicted == truth).float().mean().item(),
            "linear_probe": linear_probe(gallery.to(device), labels, queries.to(device), truth),
        }

    def pairs(self, objective: Objective, device: torch.device) -> tuple[Tensor, Tensor]:
        """Embeddings of two views of each of the sample's first images, `(n, D)` each."""
        random = Randomness(Generator(device).manual_seed(0))
        x: list[Tensor] = []
        y: list[Tensor] = []
        for rows in chunks(min(len(self.sample), PAIRS), BATCH):
            images = self.sample.pixels[rows].to(device)
            for parts in (x, y):
                first = pictures_of(objective.views(images, random))[0]
                parts.append(objective.kept.pooled(first, objective.pooling).float().cpu())
        return torch.cat(x), torch.cat(y)

    def draw(self, objective: Objective, device: torch.device) -> None:
        """Write `pictures/*.png`: those that say something about this objective, each whole or not at all."""
        with undisturbed(objective):
            folder, chosen = self.run / "pictures", self.chosen()
            images = self.sample.pixels[chosen].to(device)
            views = objective.views(images, Randomness(Generator(device).manual_seed(1)))
            shown = [denormalize(view).cpu() for view in pictures_of(views)]
            write_png(view_sheet(images.cpu() / 255, shown), folder / "views.png")
            rebuilt = objective.reconstruct(views)
            if rebuilt is not None:
                masked = objective.masked(views)
                visible = None if masked is None else masked.cpu()
                write_png(reconstruction_sheet(shown[0], visible, rebuilt.cpu()), folder / "reconstructions.png")
            if isinstance(objective.kept, ViT):
                x = encoder_view(images, objective.kept.config.image_size)
                maps = cls_attention(objective.kept, x).cpu()
                write_png(attention_sheet(denormalize(x).cpu(), maps), folder / "attention.png")
            if len(self.sample) > 1:
                z = F.normalize(embeddings(objective, self.sample.pixels, device), dim=1)
                write_png(self.neighbors(z, chosen), folder / "neighbors.png")

    def chosen(self) -> Tensor:
        """Which images are shown, int64 `(n,)`: of as many classes as possible, where they are known."""
        labels = self.sample.labels
        if labels is None:
            return torch.arange(min(SHOWN, len(self.sample)))
        seen = labels[:, None] == labels  # (N, N)
        repeat = torch.tril(seen, -1).sum(dim=1)  # how many of its class come before each
        return repeat.argsort(stable=True)[:SHOWN]

    def neighbors(self, z: Tensor, chosen: Tensor) -> Image:
        """z: L2-normalized embeddings of the sample, `(N, D)`."""
        similarity = z[chosen] @ z.T
        similarity[torch.arange(len(chosen)), chosen] = -2  # no image is its own neighbor
        scores, index = similarity.topk(min(NEIGHBORS, len(z) - 1), dim=1)
        pixels = self.sample.pixels
        names = [self.name(i) for i in chosen.tolist()], [[self.name(i) for i in row] for row in index.tolist()]
        return neighbor_sheet(pixels[chosen].cpu() / 255, pixels[index].cpu() / 255, scores, *names)

    def name(self, i: int) -> str:
        """The class of the sample's image i; "" where it is not known."""
        label = -1 if self.sample.labels is None else int(self.sample.labels[i])
        names = self.sample.class_names
        return "" if label < 0 else names[label] if names else str(label)


@contextmanager
def undisturbed(objective: Objective) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in objective.modules()]
    objective.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def embeddings(objective: Objective, pixels: Tensor, device: torch.device) -> Tensor:
    """uint8 `(N, 3, n, n)` to float32 `(N, D)` on the CPU, not normalized, of the encoder that is kept."""
    encoder = objective.kept
    parts = []
    for rows in chunks(len(pixels), BATCH):
        x = encoder_view(pixels[rows].to(device), encoder.config.image_size)
        parts.append(encoder.pooled(x, objective.pooling).float().cpu())
    return torch.cat(parts)


def encoder_view(images: Tensor, size: int) -> Tensor:
    """uint8 `(N, 3, n, n)` to the normalized `(N, 3, size, size)` that the encoder is used on: resized, if need be."""
    x = images.float() / 255
    if x.shape[-1] != size:
        x = F.interpolate(x, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
    return normalize(x)


def pictures_of(views: list[Tensor]) -> list[Tensor]:
    """Those entries of `Objective.views` that are pictures."""
    return [view for view in views if view.ndim == 4]


def cls_attention(encoder: ViT, x: Tensor) -> Tensor:
    """How the last block's CLS token spreads its attention over the patches: `(N, heads, grid, grid)`."""
    _, weights = encoder.with_attention(x)
    N, heads = weights.shape[:2]
    grid = encoder.config.grid
    return weights[:, :, 0, encoder.config.prefix_tokens :].reshape(N, heads, grid, grid)
