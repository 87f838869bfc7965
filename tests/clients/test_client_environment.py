"""The environment in which clients that others wrote run unmodified."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest
from support.client_environment import FOLDER, LOCK, client_variables, run_client

IMPORTS = Path(__file__).parent / "programs" / "imports.py"
THEIRS = ("river_client", "tinker", "datasets")


def test_all_three_clients_are_there_and_share_our_torch() -> None:
    """The official `river_client` is found before our SDK, the cookbook imports whole, and torch is not doubled."""
    ended = run_client(IMPORTS, environment={})
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    for name, version in found["versions"].items():
        assert f"\n{name}=={version} " in LOCK.read_text()
    for name, file in found["files"].items():
        is_theirs = name.startswith(THEIRS)
        root = FOLDER if is_theirs else Path(sysconfig.get_path("purelib"))
        assert Path(file).is_relative_to(root), (name, file)
        assert Path(file).is_relative_to(FOLDER) == is_theirs, (name, file)


def test_the_programs_of_a_client_are_run_by_name() -> None:
    """`tinker version` runs from the environment, by the version of the lock."""
    ended = run_client("tinker", "version", environment={})
    assert (ended.returncode, ended.stdout) == (0, "tinker 0.38.0\n"), ended.stderr


def test_a_client_sees_nothing_of_what_the_tests_are_set_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Keys, paths and addresses of this process do not reach a client, and hubs are out of its reach."""
    for name in ("RIVER_API_KEY", "TINKER_API_KEY", "PYTHONPATH"):
        monkeypatch.setenv(name, "of the tests")
    variables = client_variables({"TINKER_BASE_URL": "http://127.0.0.1:1"})
    assert {"RIVER_API_KEY", "TINKER_API_KEY", "PYTHONPATH"}.isdisjoint(variables)
    assert variables["TINKER_BASE_URL"] == "http://127.0.0.1:1"
    assert variables["HF_HUB_OFFLINE"] == "1"
