"""`patchsight-eval --source RUN --train … --test …`: parse, judge, say where the report is."""

import sys
from collections.abc import Sequence

from patchsight_serve.config import fail
from patchsight_serve.errors import PatchsightError
from patchsight_train.judge.settings import EvalSettings

PROG = "patchsight-eval"


def main(argv: Sequence[str] | None = None) -> None:
    """Exits with 2 on a wrong setting, 1 if the work fails; 130 by Ctrl-C."""
    settings = EvalSettings.from_command_line(PROG, sys.argv[1:] if argv is None else argv)
    from patchsight_train.judge.command import run  # only now: `--help` must not wait for torch

    try:
        run(settings)
    except (PatchsightError, OSError) as error:
        fail(PROG, getattr(error, "message", str(error)), status=1)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
