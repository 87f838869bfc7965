"""Loaded into the package's own test run: its tests take the address from the environment, but not the key."""

from __future__ import annotations

import importlib
import os

import pytest


def pytest_sessionstart(session: pytest.Session) -> None:
    """Their fixtures read the key when they make a client."""
    importlib.import_module("tests.conftest").__dict__["api_key"] = os.environ["RIVER_TEST_KEY"]
