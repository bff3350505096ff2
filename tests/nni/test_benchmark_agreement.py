"""The comparison with float64 runs on a search's folder, and misses its target where scores differ."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def agreement(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("agreement")
    sys.modules.pop("agreement")


def test_agreement(agreement: Any, finished: Any, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(finished.path), "--candidates", "4", "--images", "32", "--sigmas", "0.01", "0.05", "--check"]
    assert agreement.main(arguments) == 0
    assert "sigmas 0.01 0.05: tau of the scores 1.0000" in capsys.readouterr().out
    # With noise of another seed the losses are others.
    true = agreement.flatness

    def other(*args: Any, generator: Any, **options: Any) -> Any:
        return true(*args, generator=generator.manual_seed(99), **options)

    monkeypatch.setattr(agreement, "flatness", other)
    assert agreement.main(arguments) == 1
