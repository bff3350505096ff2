"""The evaluators: NNI's multi-trial strategies on the weights of a trained supernet, nothing trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nni
import numpy as np
import pytest
import torch
import yaml
from nni.nas.experiment import NasExperiment
from nni.nas.experiment.config import NasExperimentConfig, SequentialEngineConfig
from nni.nas.hub.pytorch import NasBench201
from nni.nas.strategy import Random, RegularizedEvolution
from torch import nn

from genas_plugins.checkpoints import CheckpointError, save_supernet
from genas_plugins.darts.genotype import Genotype
from genas_plugins.darts.supernet import SuperNet
from genas_plugins.darts.zoo import ZOO
from genas_plugins.experiment import config
from genas_plugins.experiment.scorer import Scorer
from genas_plugins.spaces import DartsSearchSpace, NasBench201Architecture, NasBench201SearchSpace
from nni_strategy import CombinedEvaluator, DartsSpace, FlatnessEvaluator, GeNAS, NasBench201Space
from nni_strategy.samples import SampleSpace
from nni_strategy.space import genotype_to_sample, sample_to_architecture, sample_to_genotype

DATA = {
    "name": "digits",
    "train_images": 64,
    "validation_images": 64,
    "test_images": 32,
    "recalibration_images": 32,
    "seed": 1,
}


@pytest.fixture
def search(tmp_path: Path, nothing_in_the_home_folder: None) -> Callable[..., list[Any]]:
    """Runs a multi-trial strategy in this process and returns the models, best first."""

    def run(space: Any, evaluator: Any, strategy: Any, trials: int, model_format: str = "simplified") -> list[Any]:
        settings = NasExperimentConfig(
            SequentialEngineConfig(max_model_count=trials), model_format, experiment_working_directory=str(tmp_path)
        )
        experiment = NasExperiment(space, evaluator, strategy, settings)
        try:
            experiment.run()
            return experiment.export_top_models(trials)
        finally:
            experiment.stop()

    return run


@pytest.fixture(scope="module")
def genotypes() -> list[Genotype]:
    rng = np.random.default_rng(0)
    return [DartsSearchSpace().sample(rng) for _ in range(3)]


@pytest.fixture(scope="module")
def architectures() -> list[NasBench201Architecture]:
    """Of the other run, which is read in a quarter of the time."""
    rng = np.random.default_rng(0)
    return [NasBench201SearchSpace().sample(rng) for _ in range(3)]


def darts_space() -> DartsSpace:
    return DartsSpace(10, 4, 3)


def checked(models: list[Any], trials: int) -> list[Any]:
    assert len(models) == trials
    assert len({json.dumps(model.sample, sort_keys=True) for model in models}) == trials
    assert [model.metric for model in models] == sorted((model.metric for model in models), reverse=True)
    return models


def test_random_search_by_flatness_agrees_with_the_command(
    search: Callable[..., list[Any]], genas: Any, darts: Any
) -> None:
    evaluator = FlatnessEvaluator(darts.path, device="cpu")
    best, *_ = checked(search(darts_space(), evaluator, Random(seed=0), 4), 4)
    code = str(sample_to_genotype(best.sample))
    shown = genas("score", code, "--run", darts.path, "--metric", "flatness", "--device", "cpu")
    assert shown.stdout.splitlines()[1].split() == ["score", f"{best.metric:.6g}"]
    # Found again by whoever asks, to the last digit.
    again = Scorer.from_run(darts.path, device="cpu")
    assert again.measure(Genotype.from_code(map(int, code.split())), evaluator.trained.score).score == best.metric


def test_evolution_by_angle_and_flatness_agrees_with_the_command(
    search: Callable[..., list[Any]], genas: Any, finished: Any
) -> None:
    evaluator = CombinedEvaluator(finished.path, metric="angle+flatness", device="cpu")
    strategy = RegularizedEvolution(population_size=4, sample_size=2, mutation_prob=0.3, seed=0)
    best, *_ = checked(search(NasBench201Space(10, 4, 1), evaluator, strategy, 6), 6)
    code = str(sample_to_architecture(best.sample))
    shown = genas("score", code, "--run", finished.path, "--device", "cpu")
    assert shown.stdout.splitlines()[:2] == [
        "metric               angle+flatness",
        f"score                {best.metric:.6g}",
    ]


def test_a_run_s_own_candidates_have_its_scores(darts: Any) -> None:
    evaluator = CombinedEvaluator(darts.path, metric="angle+flatness", device="cpu")
    for record in darts.records[:2]:
        genotype = Genotype.from_code(record["candidate"])
        for model in (
            genotype,
            genotype_to_sample(genotype),
            DartsSpace(10, 4, 3).freeze(genotype_to_sample(genotype)),
        ):
            assert evaluator.measure(model).score == pytest.approx(record["score"], rel=1e-12)
    fixed = DartsSpace.frozen_factory(genotype_to_sample(genotype))(10, 4, 3)
    assert evaluator.evaluate(fixed) == pytest.approx(record["score"], rel=1e-12)


def test_settings_beat_those_of_the_run(finished: Any, architectures: list[NasBench201Architecture]) -> None:
    evaluator = CombinedEvaluator(finished.path, "flatness", sigmas=[0.1, 0.2], alpha=0.5, device="cpu")
    measured = evaluator.measure(architectures[0])
    assert measured.flatness is not None
    assert measured.flatness.sigmas == (0.1, 0.2)
    first, second = measured.flatness.losses
    # Eq. 4.
    assert measured.score == pytest.approx(1 / (abs(second - first) / 0.1 + 0.5 * first / 0.1 + 1e-5), rel=1e-12)
    accuracy = CombinedEvaluator(finished.path, "accuracy", device="cpu").measure(architectures[0])
    assert accuracy.score * 64 == pytest.approx(round(accuracy.score * 64))


def test_common_noise_is_a_function_of_the_seed_of_the_run(
    finished: Any, architectures: list[NasBench201Architecture]
) -> None:
    chosen: dict[str, Any] = {"noise": "random_walk", "relative": True, "draws": 2, "common": True}
    evaluator = FlatnessEvaluator(finished.path, **chosen, device="cpu")
    trained = Scorer.from_run(finished.path, device="cpu")
    score = evaluator.trained.score
    assert {name: getattr(score, name) for name in chosen} == chosen
    subnet = trained.paths.supernet.subnet(architectures[0])
    common = trained.paths.common_noise(trained.seed)
    expected = score(subnet, trained.validation, recalibration=trained.recalibration, common=common)
    assert evaluator.measure(architectures[0]) == expected
    # The strategy measures with what the experiment's file says.
    settings = config.Score(metric="flatness", **chosen)
    assert GeNAS(score=settings.build()).score == settings.build()
    assert {name: getattr(settings.build(), name) for name in chosen} == chosen


def test_noise_along_eigenvectors_reaches_the_measurement(
    finished: Any, architectures: list[NasBench201Architecture]
) -> None:
    chosen: dict[str, Any] = {"noise": "hessian", "relative": True, "hessian_directions": 2, "common": False}
    evaluator = FlatnessEvaluator(finished.path, **chosen, device="cpu")
    score = evaluator.trained.score
    assert {name: getattr(score, name) for name in chosen} == chosen
    measured = evaluator.measure(architectures[0])
    assert measured == Scorer.from_run(finished.path, score=score, device="cpu").measure(architectures[0])
    # The strategy measures with what the experiment's file says.
    settings = config.parse({"score": {"metric": "flatness", **chosen}}).score
    assert GeNAS(score=settings.build()).score == settings.build()
    assert {name: getattr(settings.build(), name) for name in chosen} == chosen
    with pytest.raises(ValueError, match="'hessian' cannot be common"):
        FlatnessEvaluator(finished.path, noise="hessian", common=True)


def test_settings_that_are_not_given_are_those_of_the_run(
    finished: Any, tmp_path: Path, architectures: list[NasBench201Architecture]
) -> None:
    folder = shutil.copytree(finished.path, tmp_path / "run")
    experiment = yaml.safe_load((folder / "config.yaml").read_text())
    experiment["score"].update(alpha=0.25, sigmas=[0.1, 0.3])
    (folder / "config.yaml").write_text(yaml.safe_dump(experiment))
    measured = FlatnessEvaluator(folder, device="cpu").measure(architectures[0])
    assert measured.flatness is not None
    first, second = measured.flatness.losses
    # Eq. 4.
    assert measured.score == pytest.approx(1 / (abs(second - first) / 0.2 + 0.25 * first / 0.1 + 1e-5), rel=1e-12)


def test_a_checkpoint_of_the_official_format_scores_like_the_run_it_came_from(
    search: Callable[..., list[Any]], darts: Any, tmp_path: Path, genotypes: list[Genotype]
) -> None:
    run = Scorer.from_run(darts.path, device="cpu")
    path = tmp_path / "official.pth.tar"
    torch.save({"epoch": 3, "state_dict": run.paths.supernet.state_dict(), "optimizer": {"state": {}}}, path)
    initial = darts.path / "initial.safetensors"
    before = DartsSpace(10, 4, 3)
    state = {name.removeprefix("network.supernet."): value for name, value in before.state_dict().items()}
    assert state.keys() == run.paths.supernet.state_dict().keys()
    evaluator = FlatnessEvaluator(path, data=DATA, seed=1, device="cpu")
    for genotype in genotypes:
        assert evaluator.measure(genotype).score == run.measure(genotype, evaluator.trained.score).score
    with pytest.raises(ValueError, match="needs the weights before training, which this supernet comes without"):
        CombinedEvaluator(path, "angle", data=DATA, device="cpu").measure(genotypes[0])
    angle = CombinedEvaluator(path, "angle", data=DATA, initial=initial, device="cpu")
    score = CombinedEvaluator(darts.path, "angle", device="cpu").measure(genotypes[0]).score
    assert angle.measure(genotypes[0]).score == score > 0
    models = checked(search(darts_space(), evaluator, Random(seed=1), 2), 2)
    assert models[0].metric == run.measure(sample_to_genotype(models[0].sample), evaluator.trained.score).score


def test_our_own_checkpoints_will_do(
    finished: Any, tmp_path: Path, architectures: list[NasBench201Architecture]
) -> None:
    run = Scorer.from_run(finished.path, device="cpu")
    path = save_supernet(run.paths.supernet, tmp_path / "supernet.safetensors")
    scores = {
        FlatnessEvaluator(source, data=DATA, seed=1, device="cpu").measure(architectures[0]).score
        for source in (path, finished.path / "supernet.ckpt", str(path))
    }
    assert len(scores) == 1
    # The seed decides the noise.
    assert FlatnessEvaluator(path, data=DATA, seed=2, device="cpu").measure(architectures[0]).score not in scores


def test_another_space_with_its_saved_weights(search: Callable[..., list[Any]], tmp_path: Path) -> None:
    def space() -> NasBench201:
        return NasBench201(4, 1, 10)

    torch.manual_seed(0)
    trained = space()
    GeNAS().mutate_model(trained)
    before = tmp_path / "before.pt"
    torch.save(trained.state_dict(), before)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    path = tmp_path / "nb201.pt"
    torch.save(trained.state_dict(), path)
    mine = space()
    evaluator = CombinedEvaluator(
        path, "angle+flatness", data=DATA, space=mine, initial=before, batch_size=32, device="cpu"
    )
    best, *_ = checked(search(space(), evaluator, Random(seed=0), 3), 3)
    fresh = CombinedEvaluator(
        path, "angle+flatness", data=DATA, space=space(), initial=before, batch_size=32, device="cpu"
    )
    measured = fresh.measure(best.sample)
    assert measured.score == best.metric
    assert 0 < (measured.angle or 0) < 1
    # Six edges, and still a choice on each.
    assert len(mine.simplify()) == 6
    # The same weights measured by the strategy's own means.
    candidate = SampleSpace(space()).from_json(best.sample)
    assert fresh.trained.measure(candidate).score == best.metric
    with pytest.raises(TypeError, match="Linear does not tell its architecture"):
        fresh.measure(nn.Linear(2, 2))
    torch.save({"stem.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="does not fit NasBench201"):
        CombinedEvaluator(path, data=DATA, space=space(), device="cpu").measure(best.sample)


def test_both_formats_of_models_work(search: Callable[..., list[Any]], finished: Any) -> None:
    evaluator = FlatnessEvaluator(finished.path, device="cpu")
    simplified = search(NasBench201Space(10, 4, 1), evaluator, Random(seed=3), 2)
    raw = search(NasBench201Space(10, 4, 1), evaluator, Random(seed=3), 2, "raw")
    assert {model.metric for model in simplified} == {model.metric for model in raw}


def test_a_trial_elsewhere_gets_the_same_evaluator(finished: Any, architectures: list[NasBench201Architecture]) -> None:
    evaluator = CombinedEvaluator(finished.path, "angle+flatness", sigmas=(1e-3, 2e-3), gamma=2.0, device="cpu")
    sent = nni.dump(evaluator)
    received = nni.load(sent)
    assert type(received).__name__ == "CombinedEvaluator"
    assert received.settings == evaluator.settings
    assert received.measure(architectures[0]).score == evaluator.measure(architectures[0]).score
    assert "gamma=2.0" in repr(evaluator)


def test_wrong_settings_are_refused_at_once(darts: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run folder or checkpoint"):
        FlatnessEvaluator(tmp_path / "nothing")
    with pytest.raises(ValueError, match="pass data="):
        FlatnessEvaluator(darts.path / "supernet.ckpt")
    with pytest.raises(ValueError, match="Unknown metric 'sharpness'; valid metrics: flatness, angle"):
        CombinedEvaluator(darts.path, metric="sharpness")
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        FlatnessEvaluator(darts.path, draws=0)
    with pytest.raises(ValueError, match="strictly increasing"):
        FlatnessEvaluator(darts.path, sigmas=[2, 1])
    with pytest.raises(TypeError, match="space must be an NNI ModelSpace, got Linear"):
        FlatnessEvaluator(darts.path, space=nn.Linear(2, 2))
    with pytest.raises(TypeError, match="CombinedEvaluator takes a metric"):
        FlatnessEvaluator(darts.path, metric="angle")


def test_a_folder_without_a_supernet_and_a_model_without_an_architecture(darts: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.yaml"):
        FlatnessEvaluator(tmp_path).measure({})
    with pytest.raises(TypeError, match="Linear does not tell its architecture; expected a Genotype"):
        FlatnessEvaluator(darts.path, device="cpu").measure(nn.Linear(2, 2))


@pytest.mark.parametrize("classes", [5, 12])
def test_a_supernet_of_other_classes_than_the_images_is_refused(classes: int, tmp_path: Path) -> None:
    path = tmp_path / "supernet.safetensors"
    save_supernet(SuperNet(classes, 4, 2), path)
    evaluator = FlatnessEvaluator(path, data={"name": "digits", "validation_images": 32, "recalibration_images": 32})
    with pytest.raises(ValueError, match=rf"supernet has {classes} classes, and the images \(digits\) have 10"):
        evaluator.evaluate(ZOO["genas_flatness_c10"].genotype)


def test_another_space_of_other_classes_is_refused(tmp_path: Path) -> None:
    space = GeNAS().mutate_model(NasBench201(4, 1, 5))
    torch.save(space.state_dict(), tmp_path / "state.pt")
    data = {"name": "digits", "validation_images": 32, "recalibration_images": 32}
    evaluator = FlatnessEvaluator(tmp_path / "state.pt", data=data, space=NasBench201(4, 1, 5))
    with pytest.raises(ValueError, match=r"supernet has 5 classes, .* have 10"):
        _ = evaluator.trained
