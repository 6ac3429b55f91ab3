"""What trials found, on the disk: the next start need not try again."""

import json
import logging
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

from patchsight_serve.trial import Trial

logger = logging.getLogger(__name__)


class TrialRecord:
    """A JSON file of trials by what they depend on. One that cannot be read or written costs a trial, and no more."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, key: str) -> Trial | None:
        """The trial of this key, if there was one."""
        found = self._read().get(key)
        try:
            return None if found is None else Trial(**{name: float(value) for name, value in found.items()})
        except (TypeError, ValueError, AttributeError):
            logger.warning("%s: the trial of %s is damaged, and made again", self._path, key)
            return None

    def put(self, key: str, trial: Trial) -> None:
        """Keep a trial. Whoever reads meanwhile sees the file of before, or that of afterwards."""
        content = json.dumps(self._read() | {key: asdict(trial)}, indent=2)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(prefix=f".{self._path.name}.", dir=self._path.parent)
            with os.fdopen(handle, "w") as file:
                file.write(content)
            Path(partial).replace(self._path)
        except OSError as error:
            logger.warning("%s: the trial of %s could not be kept: %s", self._path, key, error)

    def _read(self) -> dict[str, dict[str, float]]:
        try:
            content = json.loads(self._path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be read, its trials are made again: %s", self._path, error)
            return {}
        return content if isinstance(content, dict) else {}
