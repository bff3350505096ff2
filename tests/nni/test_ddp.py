"""Two processes: the same paths at the same steps, equal weights, and the same search result in each."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="torch was built without the gloo backend",
)

# What each process runs: a search as a user would write it, and a file with what it saw.
PROCESS = """
import json
import sys

import numpy as np
import torch

torch.set_num_threads(1)

from nni_strategy import GeNAS, NasBench201Space, supernet_evaluator  # first, as a user might

import nni.nas.oneshot.pytorch.strategy
import nni.nas.strategy
from genas_plugins.experiment.scorer import Scorer
from genas_plugins.datasets import ImageTensors, SearchData
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.space import RawFormatModelSpace
from pytorch_lightning.callbacks import Callback

whole = nni.nas.strategy.RandomOneShot is nni.nas.oneshot.pytorch.strategy.RandomOneShot


class Witness(Callback):
    def __init__(self):
        self.paths, self.images = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        architecture = getattr(space.network, "_candidate")
        self.paths.append([trainer.current_epoch, batch_idx, str(architecture)])
        self.images.append(batch[1].tolist())


def part(seed):
    rng = np.random.default_rng(seed)
    pixels = torch.from_numpy(rng.integers(0, 256, (32, 3, 8, 8), dtype=np.uint8))
    return ImageTensors(pixels, torch.arange(32), tuple(str(label) for label in range(32)))


folder, rank = sys.argv[1:]
half = (0.5, 0.5, 0.5)
data = SearchData(part(0), part(0), part(1), None, half, half, 32, "digits", 8)
torch.manual_seed(int(rank))
space = NasBench201Space(32, 4, 1)
witness = Witness()
evaluator = supernet_evaluator(
    data,
    2,
    batch_size=4,
    accelerator="cpu",
    devices=2,
    strategy="ddp_find_unused_parameters_true",
    callbacks=[witness],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    default_root_dir=folder,
)
# Counts what this process measures itself.
measure, measured = Scorer.measure, []


def counting(*arguments):
    measured.append(arguments)
    return measure(*arguments)


Scorer.measure = counting
strategy = GeNAS(
    population=4,
    generations=2,
    parents=2,
    mutants=1,
    crossovers=1,
    recalibration_images=16,
    validation_images=24,
)
strategy(RawFormatModelSpace(space, evaluator), SequentialExecutionEngine())
torch.save({name: value for name, value in space.named_parameters()}, f"{folder}/weights{rank}.pt")
with open(f"{folder}/seen{rank}.json", "w") as file:
    scores = [[record["candidate"], record["score"]] for record in strategy.records]
    best = [[model.sample, model.metric] for model in strategy.list_models(limit=3)]
    # All candidates by this process alone.
    space = strategy.paths.search_space
    candidates = [space.from_json(record["candidate"]) for record in strategy.records]
    alone = [measure(strategy.scorer, candidate).score for candidate in candidates]
    own = [space.to_json(candidate) for _, candidate in measured]
    report = {"alone": alone, "own": own}
    report |= {"paths": witness.paths, "images": witness.images, "scores": scores, "best": best, "whole": whole}
    json.dump(report, file)
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def seen(
    tmp_path_factory: pytest.TempPathFactory, two_processes: Callable[..., None], genas: Any
) -> tuple[list[dict[str, Any]], list[dict[str, torch.Tensor]]]:
    """What the two processes saw, and the weights they ended with."""
    folder = tmp_path_factory.mktemp("ddp")
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    two_processes(genas.server, folder, PROCESS, **address, WORLD_SIZE="2", NODE_RANK="0")
    reports = [json.loads((folder / f"seen{rank}.json").read_text()) for rank in range(2)]
    weights = [torch.load(folder / f"weights{rank}.pt", weights_only=True) for rank in range(2)]
    return reports, weights


def test_every_process_trains_the_same_paths(seen: tuple[list[dict[str, Any]], Any]) -> None:
    (first, second), _ = seen
    # 32 images, 4 a batch and process: four steps in each of two epochs.
    assert [path[:2] for path in first["paths"]] == [[epoch, batch] for epoch in range(2) for batch in range(4)]
    assert first["paths"] == second["paths"]
    assert len({path[2] for path in first["paths"]}) == 8


def test_processes_train_on_different_images(seen: tuple[list[dict[str, Any]], Any]) -> None:
    (first, second), _ = seen
    for start in (0, 4):
        batches = first["images"][start : start + 4] + second["images"][start : start + 4]
        assert sorted(label for batch in batches for label in batch) == list(range(32))
    assert first["images"][:4] != first["images"][4:]


def test_weights_end_equal(seen: tuple[Any, list[dict[str, torch.Tensor]]]) -> None:
    _, (first, second) = seen
    # The processes began with different weights: the first one's were sent around.
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_every_process_finds_the_same(seen: tuple[list[dict[str, Any]], Any]) -> None:
    (first, second), _ = seen
    assert len(first["scores"]) == 8
    assert first["scores"] == second["scores"]
    assert first["best"] == second["best"]


def test_processes_share_the_candidates(seen: tuple[list[dict[str, Any]], Any]) -> None:
    reports, _ = seen
    proposed = [candidate for candidate, _ in reports[0]["scores"]]
    for rank, report in enumerate(reports):
        assert report["own"] == proposed[rank::2]
        # One process that measures all finds the same scores.
        assert report["alone"] == [score for _, score in report["scores"]]


def test_importing_the_package_leaves_nni_whole(seen: tuple[list[dict[str, Any]], Any]) -> None:
    # Had the modules been imported in another order, NNI's own one-shot strategies would only raise.
    assert all(report["whole"] for report in seen[0])


# NADarts, with an aggregate that weighs losses by their size, which are other ones in each process.
RELAXED = """
import sys

import torch

torch.set_num_threads(1)

from nni_strategy import NADarts, NasBench201Space

from nni.nas.evaluator.pytorch import Classification, DataLoader
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.space import RawFormatModelSpace
from torch.utils.data import TensorDataset

folder, rank = sys.argv[1:]
images = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
loader = DataLoader(TensorDataset(images, torch.arange(32) % 10), batch_size=8)
evaluator = Classification(
    train_dataloaders=loader,
    val_dataloaders=loader,
    max_epochs=1,
    num_classes=10,
    accelerator="cpu",
    devices=2,
    strategy="ddp",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    default_root_dir=folder,
)
torch.manual_seed(0)
space = NasBench201Space(10, 4, 1)
strategy = NADarts(distance=1, size=2, aggregate="mean-std", arc_learning_rate=0.05)
strategy(RawFormatModelSpace(space, evaluator), SequentialExecutionEngine())
torch.save(dict(space.named_parameters()), f"{folder}/mixed{rank}.pt")
"""


def test_processes_end_with_the_same_mixture(tmp_path: Path, two_processes: Callable[..., None], genas: Any) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    two_processes(genas.server, tmp_path, RELAXED, **address, WORLD_SIZE="2", NODE_RANK="0")
    first, second = (torch.load(tmp_path / f"mixed{rank}.pt", weights_only=True) for rank in range(2))
    # NNI draws an even mixture, up to a thousandth.
    assert sum("_arch_alpha" in name and value.detach().abs().max() > 0.02 for name, value in first.items()) == 6
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
