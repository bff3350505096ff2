"""A space that another package registers, in one file of its own: examples/blur_space."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from genas_plugins import spaces
from genas_plugins.checkpoints import load_supernet
from genas_plugins.datasets import load_search_data

SPACE = Path(__file__).parents[2] / "examples" / "blur_space" / "blur_space.py"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the space and its entry point, as pip would leave them."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "blur_space.py").write_text(SPACE.read_text(encoding="utf-8"), encoding="utf-8")
    told = folder / "toy_space-1.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-space\nVersion: 1.0\n")
    (told / "entry_points.txt").write_text(f"[{spaces.GROUP}]\nblur = blur_space:BlurSpace\ndarts = nothing:There\n")
    return folder


def test_genas_search_finds_the_optimum_of_a_registered_space(
    installed: Path, genas: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = f"import sys; sys.path.insert(0, {str(installed)!r})"
    run = tmp_path / "run"
    done = genas("search", "--config", SPACE.with_name("blur.yaml"), "--output", run, before=before, pictures=False)
    assert done.status == 0, done.stderr
    scores = {r["candidate"]: r["score"] for r in map(json.loads, (run / "history.jsonl").read_text().splitlines())}
    # The evolution proposes nothing twice, and ends when the space has nothing new.
    assert sorted(scores) == list(range(16))
    monkeypatch.syspath_prepend(str(installed))
    supernet = load_supernet(run / "supernet.ckpt").eval()
    data = load_search_data("digits", recalibration_images=None, seed=2)
    images = (data.validation.images.float() / 255 - torch.tensor(data.mean).view(3, 1, 1)) / torch.tensor(
        data.std
    ).view(3, 1, 1)
    with torch.no_grad():
        hits = [supernet(images, n).argmax(1) == data.validation.labels for n in range(16)]
    expected = [float(hit.float().mean()) for hit in hits]
    # A tie of two logits aside, one image is the least difference.
    assert [scores[n] for n in range(16)] == pytest.approx(expected, abs=1.5 / len(images))
    best = json.loads((run / "architecture.json").read_text())["architecture"]
    assert expected[best] == max(expected) and expected[best] > expected[15] + 0.2
    scored = genas("score", str(best), "--run", run, "--device", "cpu", "--metric", "angle+flatness", before=before)
    assert scored.status == 0, scored.stderr
    assert "angle / pi" in scored.stdout
    refused = genas("score", "16", "--run", run, before=before)
    assert refused.error == "The number of blurs is 0 to 15, got '16'."


def test_a_registered_space_takes_the_name_of_none_of_ours(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(installed))
    assert {"darts", "nasbench201", "blur"} <= set(spaces.registered_spaces())
    assert spaces.find_space("darts").size == math.prod(math.comb(n, 2) * 49 for n in (2, 3, 4, 5)) ** 2
    with pytest.raises(
        ValueError, match=r"There is no space 'blurr' \(did you mean blur\?\); there are: .*nasbench201"
    ):
        spaces.find_space("blurr")
