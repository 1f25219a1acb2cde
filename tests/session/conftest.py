"""Fixtures that the engine's tests have as well."""

from tests.runtime.conftest import *  # noqa: F403
