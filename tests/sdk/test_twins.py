"""What is public: the same in the blocking client and its asynchronous twin, and documented."""

from __future__ import annotations

import importlib.resources
import inspect
from collections.abc import Iterator
from typing import Any

import pytest

import river_client as river

HANDLES = [
    (river.AsyncModel, river.Model),
    (river.AsyncSession, river.Session),
    (river.AsyncPendingOp, river.PendingOp),
    (river.AsyncLearning, river.Learning),
    (river.AsyncLocalLearning, river.LocalLearning),
]


def parts() -> list[tuple[type, type]]:
    """`client.runs`, `client.checkpoints` and the rest, as both clients have them."""
    blocking = river.Client(api_key="rv-x", base_url="http://127.0.0.1:9")
    return [
        (type(getattr(blocking._twin, name)), type(part))
        for name, part in vars(blocking).items()
        if not name.startswith("_") and hasattr(part, "_twin")
    ]


def twins() -> list[Any]:
    pairs = [(river.AsyncClient, river.Client), *HANDLES, *parts()]
    return [pytest.param(*pair, id=pair[1].__name__) for pair in pairs]


def members(kind: type) -> dict[str, Any]:
    return {name: value for name, value in inspect.getmembers(kind) if not name.startswith("_")}


def test_every_part_of_the_client_has_a_twin() -> None:
    """A resource that only one of the two clients has would be missed by the tests of this module."""
    blocking = river.Client(api_key="rv-x", base_url="http://127.0.0.1:9")
    mine, theirs = (
        {name for name in vars(each) if not name.startswith("_")}
        for each in (blocking, blocking._twin)
    )
    assert mine == theirs
    assert len(parts()) == len(mine - {"api_key", "base_url"})


@pytest.mark.parametrize(("asynchronous", "blocking"), twins())
def test_twins_have_the_same_names_and_parameters(asynchronous: type, blocking: type) -> None:
    """Every public method is there in both, with equal parameters and defaults; so is what can be read."""
    theirs, mine = members(asynchronous), members(blocking)
    methods = {name for name, member in theirs.items() if not isinstance(member, property)}
    # A loop in this process is begun by the model.
    methods -= {"begin"}
    assert methods == {name for name, member in mine.items() if not isinstance(member, property)}
    # What never changes is an attribute of the blocking handle's own.
    assert theirs.keys() - methods <= mine.keys() | {"path", "begin"}
    for name in methods:
        one, other = (inspect.signature(each[name]) for each in (theirs, mine))
        assert list(one.parameters.values()) == list(other.parameters.values()), name


def documented() -> Iterator[Any]:
    """Every public name, and every public method and property of the public classes."""
    for name in river.__all__:
        kind = getattr(river, name)
        yield pytest.param(kind, id=name)
    for kind in {getattr(river, name) for name in river.__all__} | {b for _, b in parts()}:
        if not isinstance(kind, type) or not kind.__module__.startswith("river_client"):
            continue
        for name, member in vars(kind).items():
            is_public = not name.startswith("_")
            if is_public and (inspect.isfunction(member) or isinstance(member, property)):
                yield pytest.param(member, id=f"{kind.__name__}.{name}")


@pytest.mark.parametrize("public", list(documented()))
def test_every_public_name_is_documented(public: Any) -> None:
    """In its own words: what a class inherits says nothing of it."""
    own = vars(public).get("__doc__") if isinstance(public, type) else public.__doc__
    assert own
    assert own.strip().endswith((".", ":", '"', "`", ")")) or "\n" in own


def test_the_types_are_for_users_too() -> None:
    """The package says that it is typed."""
    assert importlib.resources.files("river_client").joinpath("py.typed").is_file()
