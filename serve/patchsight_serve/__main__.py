"""patchsight-serve: serve the encoders of a model repository over HTTP."""

import logging
import sys
from collections.abc import Sequence

from patchsight_serve.config import fail
from patchsight_serve.errors import PatchsightError
from patchsight_serve.settings import ServeSettings

PROG = "patchsight-serve"


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, load, serve. Exits with 2 on a wrong setting, 1 if an encoder cannot be loaded."""
    settings = ServeSettings.from_command_line(PROG, sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("faiss").setLevel(logging.WARNING)  # tells which of its builds it tried, six lines long
    from patchsight_serve.server import serve  # only now: `--help` must not wait for ONNX Runtime

    try:
        serve(settings)
    except PatchsightError as error:
        fail(PROG, error.message, status=1)


if __name__ == "__main__":
    main()
