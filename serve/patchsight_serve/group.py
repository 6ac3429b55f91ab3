"""What is found in a gallery as a whole: groups of near-duplicates, and clusters."""

from dataclasses import dataclass


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
