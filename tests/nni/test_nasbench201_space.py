"""NasBench201Space: NNI's samples, its supernet, and searches that end in an architecture of known accuracy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nni
import numpy as np
import pytest
import torch
from nni.nas.evaluator import FunctionalEvaluator
from nni.nas.experiment import NasExperiment
from nni.nas.experiment.config import NasExperimentConfig, SequentialEngineConfig
from nni.nas.space import model_context
from nni.nas.strategy import RegularizedEvolution

from genas_plugins.checkpoints import load_supernet, save_supernet
from genas_plugins.darts.zoo import ZOO
from genas_plugins.experiment.scorer import Scorer
from genas_plugins.nasbench201 import NasBench201Network, NasBench201SuperNet
from genas_plugins.scoring import angle
from genas_plugins.spaces import NasBench201Architecture, NasBench201SearchSpace
from nni_strategy import NasBench201Space
from nni_strategy.space import architecture_to_sample, sample_to_architecture


def known(architecture: NasBench201Architecture) -> float:
    """An accuracy with one best architecture, six 3x3 convolutions, which has 94."""
    return 10.0 + 14.0 * architecture.operations.count("nor_conv_3x3")


def test_every_architecture_has_a_sample_with_the_labels_of_nnis_hub() -> None:
    space = NasBench201SearchSpace()
    for architecture in space.architectures():
        assert sample_to_architecture(architecture_to_sample(architecture)) == architecture
    assert set(architecture_to_sample(architecture)) == {f"cell/{i}_{j}" for j in range(4) for i in range(j)}
    # The labels that the space itself declares.
    assert set(NasBench201Space(10, 2, 1).simplify()) == set(architecture_to_sample(architecture))


def test_under_a_model_context_it_is_the_fixed_network() -> None:
    architecture = NasBench201Architecture.from_index(9000)
    with model_context(architecture_to_sample(architecture)):
        space = NasBench201Space(num_classes=7, init_channels=4, cells_per_stage=2)
    assert isinstance(space.network, NasBench201Network) and space.network.architecture == architecture
    assert space(torch.randn(2, 3, 8, 8)).shape == (2, 7)


def test_paths_of_the_supernet_are_subnets_and_have_an_angle() -> None:
    torch.manual_seed(0)
    space = NasBench201Space(10, 4, 1).eval()
    images = torch.randn(4, 3, 8, 8)
    initial = {name: value.clone() for name, value in space.named_parameters()}
    before = NasBench201SuperNet(**space.supernet.arguments)
    before.load_state_dict(space.supernet.state_dict())
    with torch.no_grad():
        for parameter in space.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    rng = np.random.default_rng(0)
    for _ in range(5):
        architecture = space.search_space.sample(rng)
        sample = space.to_sample(architecture)
        space.network.resample(dict(sample))
        assert torch.equal(space(images), space.subnet(architecture)(images))
        assert torch.equal(space.freeze(sample)(images), space.subnet(architecture)(images))
        assert space.angle(initial, architecture) == angle(before, space.supernet, architecture, normalize=True)


def test_a_candidate_of_another_space_is_refused() -> None:
    genotype = ZOO["genas_flatness_c10"].genotype
    with pytest.raises(TypeError, match="NasBench201Space has a NasBench201Architecture, got Genotype"):
        NasBench201Space(10, 2, 1).subnet(genotype)


@pytest.mark.parametrize("affine", [True, False])
def test_its_supernet_is_saved_and_loaded(affine: bool, tmp_path: Path) -> None:
    supernet = NasBench201SuperNet(4, 2, 7, affine=affine)
    save_supernet(supernet, tmp_path / "supernet.safetensors", note="x")
    loaded = load_supernet(tmp_path / "supernet.safetensors")
    assert isinstance(loaded, NasBench201SuperNet) and dict(loaded.arguments) == dict(supernet.arguments)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in supernet.state_dict().items())
    state = {f"module.{name}": value for name, value in supernet.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "distributed.pth")
    assert dict(load_supernet(tmp_path / "distributed.pth").arguments) == dict(supernet.arguments)
    del state["module.stem.0.weight"]
    torch.save({"state_dict": state}, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match=r"lacks stem\.0\.weight, so the size"):
        load_supernet(tmp_path / "cut.pth")


def test_a_search_ends_in_an_architecture_whose_accuracy_is_known(finished: Any) -> None:
    found = finished.winner
    best = NasBench201Architecture.from_string(found["architecture"])
    records = [json.loads(line) for line in (finished.path / "history.jsonl").read_text().splitlines()]
    top = max(records, key=lambda record: record["score"])
    assert top["candidate"] == str(best) and found["record"] == top
    assert 10.0 <= known(best) <= 94.0
    assert not load_supernet(finished.path / "supernet.ckpt").affine
    assert {path.name for path in finished.path.iterdir()} >= {"search.png", "loss_curves.png", "supernet.ckpt"}
    assert not (finished.path / "genotype.json").exists() and not (finished.path / "cells.svg").exists()


def test_a_candidate_has_the_score_of_the_history_whenever_it_is_measured(finished: Any) -> None:
    trained = Scorer.from_run(finished.path, device="cpu")
    for line in (finished.path / "history.jsonl").read_text().splitlines()[-2:]:
        record = json.loads(line)
        measured = trained.measure(NasBench201Architecture.from_string(record["candidate"]))
        assert measured.score == record["score"]


def test_genas_score_takes_a_string_of_the_benchmark(finished: Any, genas: Any) -> None:
    record = json.loads((finished.path / "history.jsonl").read_text().splitlines()[0])
    done = genas("score", record["candidate"], "--run", finished.path, "--device", "cpu")
    assert done.status == 0, done.stderr
    assert f"{record['score']:.6g}" in done.stdout
    wrong = genas("score", str(ZOO["genas_flatness_c10"].genotype), "--run", finished.path, "--device", "cpu")
    assert "nodes, expected 3: |op~0|" in wrong.error


def tabular(model: NasBench201Space) -> None:
    """What a table gives for the network that NNI built."""
    nni.report_final_result(known(model.network.architecture))


@pytest.mark.usefixtures("nothing_in_the_home_folder")
def test_regularized_evolution_over_a_table_ends_near_the_best(tmp_path: Path) -> None:
    settings = NasExperimentConfig(
        SequentialEngineConfig(max_model_count=150), "simplified", experiment_working_directory=str(tmp_path)
    )
    strategy = RegularizedEvolution(population_size=20, sample_size=8, mutation_prob=0.2, seed=0)
    experiment = NasExperiment(NasBench201Space(10, 1, 1), FunctionalEvaluator(tabular), strategy, settings)
    try:
        experiment.run()
        (best,) = experiment.export_top_models(1)
    finally:
        experiment.stop()
    accuracy = known(sample_to_architecture(best.sample))
    # One in 625 architectures has five or six of the convolutions: 150 random ones find such with a chance of 21 %.
    assert best.metric == accuracy >= 80.0
