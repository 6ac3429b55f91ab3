"""What the OpenAPI schema allows, and what it forbids, in every operation: the replies are those that it promises."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.python.asgi import shutdown_lifespans

# Whether bytes are an image is not for a schema to say, nor what stands in a gallery; and too many images are answered
# with 413, which is no refusal to schemathesis.
LEFT_OUT = ["positive_data_acceptance", "negative_data_rejection", "ensure_resource_availability", "use_after_free"]


@pytest.fixture
def schema(new_app: Callable[[], Any]) -> Iterator[Any]:
    """Of an application of its own: one that has been told to leave does not come back."""
    load_all_checks()
    yield schemathesis.openapi.from_asgi("/openapi.json", new_app())
    shutdown_lifespans()


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
def test_replies_are_as_documented(mode: schemathesis.GenerationMode, fuzz: Callable[..., None], schema: Any) -> None:
    asked: set[str] = set()
    left_out = CHECKS.get_by_names(LEFT_OUT)

    def check(case: Any) -> None:
        asked.add(case.operation.label)
        case.call_and_validate(excluded_checks=left_out, timeout=120)  # its own 10 s are few on a busy machine

    operations = {operation.ok().label: operation.ok() for operation in schema.get_all_operations()}
    for operation in operations.values():
        try:
            fuzz(operation.as_strategy(mode), check, few=2, many=40)
        except Unsatisfiable:  # nothing that this operation's schema would forbid
            assert mode is schemathesis.GenerationMode.NEGATIVE
    takes_something = {label for label in operations if label.startswith(("POST", "PATCH"))}
    assert asked >= (takes_something if mode is schemathesis.GenerationMode.NEGATIVE else set(operations))
