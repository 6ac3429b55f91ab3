"""SwAV: unsupervised learning of visual features by contrasting cluster assignments, arXiv:2006.09882.

In the order of its section 3: views · projection onto the sphere · scores against prototypes · codes by Sinkhorn ·
each view predicts the other's code. Without the queue of earlier features: the codes are those of the whole batch of
all ranks. Letters: B images of all ranks, b of this rank, Z width of the projection z, K prototypes, τ temperature,
ε of Sinkhorn.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchsight_train.distributed import gather, mean_over_ranks, rank
from patchsight_train.encoder import Encoder, default_pooling
from patchsight_train.multi_crop import GLOBAL, batches, crops, cut, entropy, swapped_loss
from patchsight_train.objective import Metrics, Objective, When
from patchsight_train.objective_settings import SwAVSettings
from patchsight_train.randomness import Randomness


class SwAV(Objective):
    encoder_name = "encoder"

    def __init__(self, encoder: Encoder, settings: SwAVSettings) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = default_pooling(encoder.config)
        self.head = projection_head(encoder.config.width, settings.projection_hidden, settings.projection_width)
        self.prototypes = nn.Parameter(torch.randn(settings.prototypes, settings.projection_width))  # (K, Z)
        self.normalize_prototypes()
        self.settings = settings
        self.crops = crops(settings)

    def views(self, images: Tensor, random: Randomness) -> list[Tensor]:
        return cut(images, self.crops, random)

    def parts(self, views: list[Tensor], when: When) -> Iterator[tuple[Tensor, Metrics]]:  # noqa: ARG002
        """The codes of the global views, then the predictions from all views, a batch of one size at a time.

        Codes need the whole batch. Where the first batch is that, its embeddings serve for both; else they are computed
        first, without a graph.
        """
        B, tau = len(views[0]), self.settings.temperature
        pairs = GLOBAL * (len(views) - 1)  # of different views
        codes: list[Tensor] = []
        for x, pieces in batches(views, self.micro_batch):
            h = self.encoder.pooled(x, self.pooling)
            metrics: Metrics = {}
            if not codes:
                whole = h.detach() if len(h) == GLOBAL * B else self.global_embeddings(views)
                center = mean_over_ranks(whole.float().mean(dim=0))
                codes, metrics = self.codes(whole, center)
            loss = swapped_loss(self.scores(h, center), pieces, codes, tau) / pairs  # Eq. 1
            yield loss, {"loss": loss.detach(), **metrics}

    @torch.no_grad()
    def global_embeddings(self, views: list[Tensor]) -> Tensor:
        """Of the first view's images, then the second's: `(2b, D)`."""
        return torch.cat([self.encoder.pooled(x, self.pooling) for x, _ in batches(views[:GLOBAL], self.micro_batch)])

    def scores(self, h: Tensor, center: Tensor) -> Tensor:
        """zᵀc for every prototype c: embeddings `(N, D)`, and their mean, to cosines, float32 `(N, K)`."""
        z = self.head(h.float() - center)
        with torch.autocast(h.device.type, enabled=False):  # bf16 scores would be off by 0.1 once divided by ε
            return F.linear(F.normalize(z.float(), dim=1), self.prototypes)

    @torch.no_grad()
    def codes(self, h: Tensor, center: Tensor) -> tuple[list[Tensor], Metrics]:
        """Embeddings of the global views `(2b, D)` to each one's codes `(b, K)`: found among the images of all ranks.

        Their entropy says how sure an assignment is, 0 to ln K; that of their mean, how evenly prototypes are used.
        """
        s = self.settings
        own = self.scores(h, center).chunk(GLOBAL)
        every = [sinkhorn(gather(scores), s.epsilon, s.sinkhorn_iterations) for scores in own]
        q = torch.cat(every)
        metrics = {"code_entropy": entropy(q).mean(), "code_mean_entropy": entropy(q.mean(dim=0))}
        b = len(h) // GLOBAL
        return [q[rank() * b : (rank() + 1) * b] for q in every], metrics

    def before_update(self, when: When) -> None:
        """Prototypes stay as they are at first (App. A): they would follow an untrained encoder."""
        if when.epoch < self.settings.freeze_prototypes_epochs:
            self.prototypes.grad = None

    def after_update(self, when: When) -> None:  # noqa: ARG002
        self.normalize_prototypes()

    @torch.no_grad()
    def normalize_prototypes(self) -> None:
        """Each back to length 1: scores are cosines."""
        self.prototypes.copy_(F.normalize(self.prototypes, dim=1))


def projection_head(width: int, hidden: int, Z: int) -> nn.Sequential:
    """Two linear maps: embeddings less their mean `(N, D)` to `(N, Z)`, not yet of length 1.

    The paper has batch norm where this has layer norm. The statistics of a batch would make the numbers depend on which
    views share a forward pass, so on micro-batches and ranks. What batch norm is needed for is to take out what all
    pictures have in common, most of a ViT's CLS token at first, as codes stay flat with it. So the mean of the global
    views, of all ranks, is taken off before, as a constant.
    """
    return nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, Z))


def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Codes Q*, Eq. 3 to 5: the assignment most like the scores, among those that use all prototypes equally.

    Args:
        scores: `(B, K)`, float32.
        epsilon: ε > 0, of the entropy: the larger, the flatter the codes.
        iterations: each makes the prototypes' shares equal, then the images'. The paper needs 3.

    Returns:
        `(B, K)`, the paper's transposed and times B: each image's sum to 1, and each prototype's to B / K, which the
        first holds exactly, the second once converged.
    """
    log_q = scores / epsilon  # logarithms: exp(1 / ε) overflows below ε = 0.011. Constant factors drop out
    for _ in range(iterations):
        log_q = log_q.log_softmax(dim=0)
        log_q = log_q.log_softmax(dim=1)
    return log_q.exp()
