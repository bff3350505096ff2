"""Before the tests import anything of MMSegmentation: with mmcv-lite it cannot be imported first."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import mmengine.config.utils
import pytest

import mmseg_backbones  # noqa: F401


@pytest.fixture(autouse=True, scope="session")
def list_read_once() -> Iterator[None]:
    """For each base of a configuration mmengine reads the list of all of them anew, a third of a second long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmengine.config.utils, "load", functools.cache(mmengine.config.utils.load))
        yield


@pytest.fixture(scope="session")
def code() -> list[int]:
    """A genotype of all kinds of operations, of whose network of 14 cells there is a third of a published one's."""
    return [4, 3, 1, 0, 3, 3, 2, 0, 0, 3, 0, 6, 0, 0, 1, 3, 4, 0, 3, 2, 0, 3, 0, 0, 7, 0, 3, 0]
