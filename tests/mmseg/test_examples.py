"""The examples in the docstrings of the MMSegmentation backbone give what they say."""

from __future__ import annotations


def test_examples_give_what_they_say(run_examples):
    run_examples("mmseg_backbones")
