# mypy: disable-error-code="import-not-found"
"""NVIDIA Triton's python backend: `1/model.py` of a model that takes JPEG files as BYTES and gives embeddings.

Triton's dynamic batcher hands it the requests of a batch. Runs in Triton's own environment, to which the config's
parameter `path` adds what it imports.
"""

import json
import os
import sys
from typing import Any

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        sys.path[:0] = json.loads(args["model_config"])["parameters"]["path"]["string_value"].split(os.pathsep)
        from bare_encoder import BareEncoder

        self.encoder = BareEncoder.of_environment()

    def execute(self, requests: list[Any]) -> list[Any]:
        photos = [pb_utils.get_input_tensor_by_name(request, "photo").as_numpy() for request in requests]
        vectors = self.encoder.embed([self.encoder.pixels(bytes(photo[0, 0])) for photo in photos])
        return [
            pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("embedding", vectors[i : i + 1])])
            for i in range(len(requests))
        ]
