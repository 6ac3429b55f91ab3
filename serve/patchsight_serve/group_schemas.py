"""The shapes of what is found in a gallery as a whole, for the OpenAPI page."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from patchsight_serve.schemas import EncoderName, ErrorReply

SURVEY_ERRORS: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorReply, "description": "Unknown gallery."},
    429: {"model": ErrorReply, "description": "Too many questions about whole galleries are waiting."},
}


class MemberImage(BaseModel):
    """An image of a group."""

    id: str
    label: str | None
    score: float = Field(description="cosine similarity to the group's most central image, -1 to 1")
    copy_of: str | None = Field(
        description="the first id of the group with just the same bytes (sha256); null for that one, and without any"
    )


class DuplicateGroup(BaseModel):
    """Images that are linked by pairs of near-duplicates."""

    id: str = Field(description="the first of its images' ids; it names the group")
    size: int = Field(description="how many images it has")
    members: list[MemberImage] = Field(description="the most central one first, then by score; `members` at most")


class DuplicatesReply(BaseModel):
    """Groups, the largest first, equally large ones in the order of their ids."""

    encoder: EncoderName | None = Field(description="null if the gallery is empty")
    images: int = Field(description="how many were compared, each with all others")
    total: int = Field(description="how many groups there are, on all pages")
    groups: list[DuplicateGroup]
    next_cursor: str | None = Field(description="pass it as `cursor` for the next page; null at the end")


class ClusterLabel(BaseModel):
    """How many images of a cluster have a label."""

    label: str
    count: int


class TypicalImage(BaseModel):
    """An image of a cluster."""

    id: str
    label: str | None
    score: float = Field(description="cosine similarity to the cluster's center, -1 to 1")


class ImageCluster(BaseModel):
    """Images that are nearer to one center than to all others, or by hdbscan lie close together."""

    size: int = Field(description="how many images it has")
    labels: list[ClusterLabel] = Field(description="its three most frequent labels, equal counts by alphabet")
    typical: list[TypicalImage] = Field(description="closest to the center, best first, equal scores by id")


class ClustersReply(BaseModel):
    """Clusters, the largest first, equally large ones in the order of their most typical image's id."""

    encoder: EncoderName | None = Field(description="null if the gallery is empty")
    images: int = Field(description="how many there are in all clusters")
    unclustered: int = Field(description="how many are in none; 0 by kmeans")
    clusters: list[ImageCluster]


class UmapInfo(BaseModel):
    """How the map by UMAP stands."""

    state: Literal["none", "working", "waiting", "stale", "ready", "failed", "too_few", "not_installed"] = Field(
        description="`working`: it is being made. `waiting`: that of another gallery is, ask again. `ready`. `stale`: "
        "it is of images as they were; where `method` is `umap`, a new one is being made. `failed`: see `error`; tried "
        "again when it is asked for a minute later, or when the images have changed. `none`: nobody asked for it. "
        "`too_few`: it takes 16 images. `not_installed`: the server lacks the extra `map`"
    )
    error: str | None = Field(description="why it failed")


class MapReply(BaseModel):
    """Images on a plane, as columns that are all `shown` long: what is alike lies together."""

    encoder: EncoderName | None = Field(description="null if the gallery is empty")
    method: Literal["pca", "umap"] = Field(description="by which the positions are; `pca` until `umap` is ready")
    umap: UmapInfo
    images: int = Field(description="how many the gallery has")
    shown: int = Field(description="how many of them have a position here")
    ids: list[str] = Field(description="in an order without meaning: any first so many of them are a fair sample")
    labels: list[str | None]
    xs: list[float] = Field(description="0 to 1; what is the longer of the two ranges from 0 to 1")
    ys: list[float] = Field(description="0 to 1, at the same scale, with their middle at 0.5")
