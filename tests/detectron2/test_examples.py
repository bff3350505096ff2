"""The examples in the docstrings of the Detectron2 backbone give what they say."""

from __future__ import annotations

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed: docs/detectron2.md says how")

pytestmark = pytest.mark.detectron2


def test_examples_give_what_they_say(run_examples):
    run_examples("detectron2_backbones")
