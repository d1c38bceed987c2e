"""Entry points of other packages: names belong to one owner, what is broken is left out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

import pytest

from flowlik_models import plugins
from flowlik_models.plugins import load_plugins

GROUP = "flowlik.things"


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the entry points that are there: (name, value), values in the module `things`."""
    things = ModuleType("things")
    things.one, things.two = 1, 2  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "things", things)

    def set_points(*pairs: tuple[str, str]) -> None:
        points = [EntryPoint(name=name, value=value, group=GROUP) for name, value in pairs]
        monkeypatch.setattr(plugins, "entry_points", lambda group: points)

    return set_points


def loaded(builtin: Sequence[str] = (), admit: Any = lambda name, thing: (name, thing)) -> dict[str, Any]:
    return load_plugins(GROUP, builtin, admit)


def test_the_name_is_the_entry_points(given: Any) -> None:
    given(("a", "things:one"), ("b", "things:two"))
    assert loaded() == {"a": ("a", 1), "b": ("b", 2)}


def test_a_name_given_twice_names_both_owners(given: Any) -> None:
    given(("a", "things:one"), ("a", "things:two"))
    with pytest.raises(ValueError, match="the name 'a' belongs to things:one, and things:two gives it too"):
        loaded()


def test_a_builtin_name_is_refused_before_anything_is_loaded(given: Any) -> None:
    given(("b", "things:two"), ("a", "no_such_module:one"))
    with pytest.raises(ValueError, match="'a' belongs to flowlik itself, and no_such_module:one"):
        loaded(builtin=("a",))


@pytest.mark.parametrize("error", [SystemExit("stop"), RuntimeError("two\nlines")])
def test_what_raises_is_left_out_with_one_line(given: Any, error: BaseException) -> None:
    given(("bad", "things:one"), ("missing", "no_such_module:one"), ("good", "things:two"))

    def admit(name: str, thing: Any) -> Any:
        if name == "bad":
            raise error
        return thing

    with pytest.warns(UserWarning, match="is left out") as said:
        assert loaded(admit=admit) == {"good": 2}
    lines = [str(one.message) for one in said]
    assert [line.split()[1] for line in lines] == ["'bad'", "'missing'"]
    assert not any("\n" in line for line in lines)


def test_a_plugin_that_looks_into_its_own_group_finds_it_empty(given: Any) -> None:
    given(("a", "things:one"))
    assert loaded(admit=lambda name, thing: loaded()) == {"a": {}}
