"""What whitens the embeddings of an encoder that is exported: learned from images of the user, without their labels."""

import torch
from rich.console import Console
from torch import Tensor

from patchsight_train.data import sample_images
from patchsight_train.encoder import Encoder, pool, side_by_side
from patchsight_train.views import eval_view
from patchsight_train.whitening import Whitening

IMAGES = 20_000  # at most, drawn at random: a hundred for each number of a small encoder
BATCH = 512


@torch.no_grad()
def learn_whitening(
    encoder: Encoder, source: str, console: Console, both: bool = False
) -> tuple[dict[str, Whitening], int]:
    """One for each embedding of the encoder, by its pooling, and how many images they were learned from. both: also
    one for CLS and mean side by side.

    Raises as `sample_images` and `Whitening.learned`.
    """
    pixels, P = sample_images([source], encoder.config.image_size, IMAGES, console).pixels, encoder.config.prefix_tokens
    found: dict[str, list[Tensor]] = {"cls": [], "mean": []} if P else {"mean": []}
    for part in torch.split(pixels, BATCH):
        tokens = encoder(eval_view(part))
        for pooling, embeddings in found.items():
            embeddings.append(pool(tokens, P, pooling))
    learned = {pooling: torch.cat(embeddings) for pooling, embeddings in found.items()}
    if both:
        learned["both"] = side_by_side(learned["cls"], learned["mean"])
    return {pooling: Whitening.learned(x) for pooling, x in learned.items()}, len(pixels)
