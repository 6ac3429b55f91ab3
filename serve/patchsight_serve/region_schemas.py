"""The shapes of a search for a region, for the OpenAPI page."""

from typing import Any

from pydantic import BaseModel, Field

from patchsight_serve.gallery_schemas import NeighborImage
from patchsight_serve.schemas import EncoderName, ErrorReply

REGION_ERRORS: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorReply, "description": "Unknown gallery or id."},
    409: {"model": ErrorReply, "description": "A gallery of another encoder, or without originals."},
}


class RegionImage(NeighborImage):
    """An image, and where in it the region was found."""

    score: float = Field(
        description="the mean cosine of the region's patches to their best matches in the image, -1 to 1"
    )
    box: list[float] = Field(
        min_length=4, max_length=4,
        description="left, top, right and bottom of the patches that are most like the region, as fractions",
    )  # fmt: skip


class RegionReply(BaseModel):
    """Images, best first, equal scores in the order of their ids."""

    encoder: EncoderName
    neighbors: list[RegionImage]
    looked_at: int = Field(description="candidates that were compared patch by patch")
    without_original: int = Field(description="candidates whose original is not there")
    unreadable: int = Field(description="candidates whose original is damaged, or cannot be read any more")
