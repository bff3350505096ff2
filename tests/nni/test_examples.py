"""The examples in the docstrings of the strategies for NNI give what they say."""

from __future__ import annotations


def test_examples_give_what_they_say(run_examples):
    run_examples("nni_strategy")
