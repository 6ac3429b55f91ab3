"""Settings in the making: what the user gave stays, what is picked for the rest is told with its reason."""

import math
from typing import Any, TypeVar

from pydantic import ValidationError

from patchsight_serve.errors import InvalidRequest
from patchsight_train.settings import TrainSettings

S = TypeVar("S", bound=TrainSettings)

# So that a small change of what was measured changes nothing that is picked.
ROUND = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60, 80)


class Choice:
    """`settings`, and `lines`: what was picked, and why."""

    def __init__(self, settings: TrainSettings) -> None:
        self.settings = settings
        self.lines: list[str] = []

    def is_set(self, name: str) -> bool:
        """Given, or picked already."""
        return name in self.settings.model_fields_set

    def pick(self, why: str, **values: Any) -> None:
        """Set those that the objective has and that are not set yet.

        Raises:
            InvalidRequest: they do not fit together with what was given.
        """
        fields = type(self.settings).model_fields
        free = {name: value for name, value in values.items() if name in fields and not self.is_set(name)}
        if free:
            self.settings = with_values(self.settings, free)
            self.lines.append(f"{', '.join(f'{name} {_short(value)}' for name, value in free.items())}: {why}")


def with_values(settings: S, values: dict[str, Any]) -> S:
    """The same settings with more of them set, checked as a whole.

    Raises:
        InvalidRequest: they do not fit together.
    """
    given = {name: getattr(settings, name) for name in settings.model_fields_set}
    try:
        # The environment has had its say, and would now overrule the flags: there is no variable of this prefix.
        return type(settings)(**given | values, _env_prefix="\0")  # type: ignore[call-arg]
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        reason = first["msg"].removeprefix("Value error, ")
        raise InvalidRequest(f"{name}: {reason}" if name else reason) from None


def round_down(value: float) -> int:
    """The largest of 1, 2, 3, …, 10, 12, 15, …, 100, 120, … that is at most `value`; at least 1."""
    scale = 10 ** max(math.floor(math.log10(max(value, 1))) - 1, 0)
    return max((r * scale for r in ROUND if r * scale <= value), default=1)


def power_of_two(value: float) -> int:
    """The largest that is at most `value`; at least 1."""
    return 1 << max(int(value).bit_length() - 1, 0)


def duration(seconds: float) -> str:
    """For people: `20 min`, `1 h 40 min`, `3 days`."""
    minutes = seconds / 60
    if minutes < 1:
        return "a minute"
    if minutes < 59.5:
        return f"{minutes:.0f} min"
    if minutes < 60 * 48:
        hours, rest = divmod(round(minutes / 10) * 10, 60)
        return f"{hours} h" + (f" {rest} min" if rest and hours < 10 else "")
    return f"{minutes / 60 / 24:.0f} days"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return " to ".join(map(_short, value)) if isinstance(value, tuple) else str(value)
