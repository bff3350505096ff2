"""The examples in the docstrings of the core give what they say."""

from __future__ import annotations

import pytest


def test_examples_give_what_they_say(run_examples):
    run_examples("genas_plugins")


@pytest.mark.parametrize("source", ['"""\n>>> 1 + 1\n3\n"""\n', 'TWO = 2\n"""\n>>> 1 + 1\n2\n"""\n'])
def test_an_example_that_is_wrong_or_never_run_is_found(run_examples, tmp_path, monkeypatch, source):
    package = f"examples_{len(source)}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(AssertionError, match=package):
        run_examples(package, tmp_path)
