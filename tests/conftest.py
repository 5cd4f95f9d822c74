"""The harness of the specification, for the tests beside it."""

from test_service import (  # noqa: F401
    Answer,
    Clock,
    User,
    World,
    alice,
    together,
    world,
)
