"""The metrics as TensorBoard events, in `tensorboard/` of the run folder, for who asks for it."""

import math
from collections.abc import Mapping
from pathlib import Path

from patchsight_serve.errors import InvalidRequest
from patchsight_train.wording import EVALUATED


class TensorBoardLog:
    """Scalars `training/…` and `evaluation/…`, by the names that they have in `metrics.jsonl`."""

    def __init__(self, run: Path, step: int = 0) -> None:
        """Append to what is there; events beyond `step`, which a kill undid, are hidden by TensorBoard.

        Raises:
            InvalidRequest: the package tensorboard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter  # only here: few runs want it
        except ImportError:
            raise InvalidRequest(
                "--tensorboard needs a package that is missing: pip install 'patchsight[tensorboard]'"
            ) from None
        purge = step + 1 if step else None
        self.writer = SummaryWriter(run / "tensorboard", purge_step=purge)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One step's metrics; those that are not finite are left out, as its charts would end there."""
        for name, value in values.items():
            if math.isfinite(value):
                group = "evaluation" if name in EVALUATED else "training"
                self.writer.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        """Write what is still in memory."""
        self.writer.close()
