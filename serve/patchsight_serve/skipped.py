"""The images that bulk work left out, and why: a JSON line each, `{"name", "reason"}`, written as they are found."""

import json
from collections.abc import Iterable
from pathlib import Path


class Skipped:
    """The file at `path`, which is there as soon as there is a line in it. known: names and reasons from before a stop,
    in place of whatever is in the file."""

    def __init__(self, path: Path, known: Iterable[tuple[str, str]] = ()) -> None:
        self.path, self.count = path, 0
        path.unlink(missing_ok=True)
        self.add(known)

    def add(self, entries: Iterable[tuple[str, str]]) -> None:
        """What is added is in the file when this returns."""
        lines = [json.dumps({"name": name, "reason": reason}, ensure_ascii=False) + "\n" for name, reason in entries]
        if lines:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(lines)
            self.count += len(lines)


def shown(name: str) -> str:
    """A file's name as text: bytes of it that are no UTF-8 as `\\xe9`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
