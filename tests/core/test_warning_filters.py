import warnings
from contextlib import ExitStack

import pytest

from delineate.core.warning_filters import filtered_warnings


def told() -> None:
    warnings.warn("stale: a test", stacklevel=1)


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_blocks_may_end_in_any_order(first_ends_first: bool) -> None:
    before = list(warnings.filters)  # type: ignore[attr-defined]
    first, second, same = ExitStack(), ExitStack(), ExitStack()
    first.enter_context(filtered_warnings("ignore", "stale"))
    second.enter_context(filtered_warnings("ignore", "other"))
    same.enter_context(filtered_warnings("ignore", "stale"))
    (first if first_ends_first else same).close()
    told()  # the other block still ignores it
    (same if first_ends_first else first).close()
    with pytest.raises(UserWarning, match="stale"):
        told()
    second.close()
    assert warnings.filters == before  # type: ignore[attr-defined]


def test_a_filter_that_is_there_already_stays() -> None:
    for message in ("", "stale"):
        warnings.filterwarnings("ignore", message)
        before = list(warnings.filters)  # type: ignore[attr-defined]
        with filtered_warnings("ignore", message):
            told()
        assert warnings.filters == before  # type: ignore[attr-defined]


def test_one_library_s_warnings_are_refused_and_no_others() -> None:
    with filtered_warnings("ignore"), filtered_warnings("error", module="a_library"):
        told()
        with pytest.raises(UserWarning):
            exec("import warnings; warnings.warn('x')", {"__name__": "a_library"})
