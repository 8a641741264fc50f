"""The mark `quick`, against the marks that its cases have."""

import pytest
from quick_cases import mark_the_others_slow


@pytest.mark.quick("b*", "long name-?")
@pytest.mark.parametrize("case", ["b", "bb", "long name-1"])
def test_named_cases_are_quick(request: pytest.FixtureRequest, case: str) -> None:
    assert request.node.get_closest_marker("slow") is None


@pytest.mark.quick("a")
@pytest.mark.parametrize("case", ["a", "ab"])
def test_the_others_are_slow(request: pytest.FixtureRequest, case: str) -> None:
    others = {item.name: item for item in request.session.items if item.path == request.path}
    slow = others.get("test_the_others_are_slow[ab]")  # absent when slow tests were left out
    assert slow is None or slow.get_closest_marker("slow") is not None


@pytest.mark.quick("a")
@pytest.mark.parametrize("case", ["a"])
def test_a_name_that_is_no_cases_is_an_error(request: pytest.FixtureRequest, case: str) -> None:
    mark_the_others_slow([request.node])
    request.node.add_marker(pytest.mark.quick("absent"))
    with pytest.raises(pytest.UsageError, match="no case is called 'absent'.* there are a"):
        mark_the_others_slow([request.node])
