"""Fixtures that the tests of stores have as well."""

from tests.store.conftest import *  # noqa: F403
