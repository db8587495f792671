from __future__ import annotations

import pytest

from delineate.preprocessing.cache import PreparedSubject
from delineate.testing.samplers import five_subjects


@pytest.fixture
def subjects() -> list[PreparedSubject]:
    return five_subjects()
