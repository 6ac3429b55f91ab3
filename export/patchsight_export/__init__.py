"""Encoder bundles for serving, made of what was trained: export to ONNX, verify against torch, publish."""

import patchsight_serve  # noqa: F401  # before the engines: it switches their telemetry off
