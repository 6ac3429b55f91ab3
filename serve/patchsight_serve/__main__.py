"""patchsight-serve: serve the encoders of a model repository over HTTP."""

import sys
from collections.abc import Sequence

from patchsight_serve.config import fail
from patchsight_serve.errors import PatchsightError
from patchsight_serve.logs import set_up
from patchsight_serve.settings import ServeSettings

PROG = "patchsight-serve"


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, load, serve. Exits with 2 on a wrong setting, 1 if an encoder cannot be loaded."""
    settings = ServeSettings.from_command_line(PROG, sys.argv[1:] if argv is None else argv)
    set_up(settings.log_level, settings.log_format, settings.access_log)
    from patchsight_serve.server import serve  # only now: `--help` must not wait for ONNX Runtime

    try:
        serve(settings)
    except PatchsightError as error:
        fail(PROG, error.message, status=1)


if __name__ == "__main__":
    main()
