"""Encoder bundles for serving, made of what was trained: export to ONNX, verify against torch, publish."""
