"""A bundle's graph behind Triton's python backend: the `1/model.py` of a Triton that has no onnxruntime backend.

Runs in Triton's own environment, which has ONNX Runtime and numpy below 2 (under numpy 2 its outputs are empty,
without a word), and not this package: it imports nothing of it.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before ONNX Runtime, which would tell its maker of each session

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """What the backend calls: `initialize` once, `execute` with the requests of one batch, `finalize`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load `model.onnx` of this version's folder. Raises where it is not the one that the config tells of."""
        if int(np.__version__.split(".")[0]) >= 2:
            raise pb_utils.TritonModelException(f"numpy is {np.__version__}; this backend needs one below 2")
        model = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        content = model.read_bytes()
        told = json.loads(json.loads(args["model_config"])["parameters"]["patchsight"]["string_value"])["sha256"]
        found = hashlib.sha256(content).hexdigest()
        if found != told:
            raise pb_utils.TritonModelException(f"{model.name}: sha256 is {found}, config.pbtxt says {told}")
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request, in order. All images of the batch go through the graph together."""
        images = [pb_utils.get_input_tensor_by_name(request, "image").as_numpy() for request in requests]
        wanted = [list(request.requested_output_names()) for request in requests]
        names = sorted({name for each in wanted for name in each})
        try:
            values = dict(zip(names, self.session.run(names, {"image": np.concatenate(images)}), strict=True))
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error))) for _ in requests]
        ends = np.cumsum([len(each) for each in images])
        responses = []
        for each, end, count in zip(wanted, ends, map(len, images), strict=True):
            tensors = [pb_utils.Tensor(name, np.ascontiguousarray(values[name][end - count : end])) for name in each]
            responses.append(pb_utils.InferenceResponse(output_tensors=tensors))
        return responses
