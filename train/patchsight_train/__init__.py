"""Training: self-supervised image encoders from pictures nobody labelled.

The way through: `data` (images to one uint8 tensor) → `views` (augmentations) → `mae` | `simclr` | `dino` (views to a
loss) → `loop` (steps, metrics, checkpoints) → a run folder, which export reads.
"""

import patchsight_serve  # noqa: F401  # before the engines: it switches their telemetry off
