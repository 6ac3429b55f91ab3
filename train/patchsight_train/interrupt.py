"""Ctrl-C and SIGTERM: remembered until the step is done, so that no update is cut in half."""

import signal
import threading
from typing import Any, Self


class Interrupt:
    """Within it the first signal sets `asked`; a second Ctrl-C interrupts at once."""

    def __enter__(self) -> Self:
        self.asked = False
        self.before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
