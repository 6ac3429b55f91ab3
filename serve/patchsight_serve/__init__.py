"""The server: decodes images, runs exported encoders, and answers with embeddings, attention and neighbors.

Never imports torch, `patchsight_train` or `patchsight_export`. Those two may import the leaves
`manifest`, `decode`, `dataset`, `config` and `errors`, and nothing else from here.
"""

import os
import sys

# Both engines number the machine and tell their makers of their use, unless they are told not to before they are
# imported: ONNX Runtime from 1.29 on; OpenVINO by a package that it can do without.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

__version__ = "0.1.0"
