"""What is found in a gallery as a whole: groups of near-duplicates, clusters, and where on a map its images are."""

from dataclasses import dataclass

from patchsight_serve.encoder import Values


@dataclass(frozen=True)
class Member:
    """An image of a group. score: its cosine to the group's most central image, -1 to 1."""

    id: str
    label: str | None
    score: float
    copy_of: str | None  # the first id of the group with just the same bytes, but of that one itself


@dataclass(frozen=True)
class Group:
    """Images that pairs of near-duplicates link, the most central one first, then by score."""

    id: str  # the first of its ids
    size: int
    members: list[Member]  # maybe not all


@dataclass(frozen=True)
class LabelCount:
    """How many images have a label."""

    label: str
    count: int


@dataclass(frozen=True)
class Typical:
    """An image of a cluster. score: its cosine to the cluster's center, -1 to 1."""

    id: str
    label: str | None
    score: float


@dataclass(frozen=True)
class Cluster:
    """Images that are nearer to one center than to all others, or by hdbscan lie close together."""

    size: int
    labels: list[LabelCount]  # the most frequent ones
    typical: list[Typical]  # best first


@dataclass(frozen=True, eq=False)
class GalleryMap:
    """Images on a plane. ids, labels, and positions float32 `(N, 2)`, 0 to 1, are of the same length."""

    method: str  # by which they are: pca or umap
    umap: str  # how the map by UMAP stands: its `state` in the reply
    images: int  # in the gallery, of which N are on the map
    ids: list[str]
    labels: list[str | None]
    positions: Values
