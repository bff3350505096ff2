"""GeNAS as an NNI one-shot strategy: every kind of space, honest scores, no traces, resumable."""

from __future__ import annotations

import copy
import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nni
import numpy as np
import pytest
import torch
from nni.nas.evaluator.pytorch import LightningModule
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.experiment import NasExperiment
from nni.nas.experiment.config import NasExperimentConfig
from nni.nas.hub.pytorch import DARTS, NasBench101, NasBench201, ShuffleNetSpace
from nni.nas.nn.pytorch import ModelSpace, MutableBatchNorm2d, MutableConv2d, Repeat
from nni.nas.space import RawFormatModelSpace
from nni.nas.utils.serializer import get_default_serializer
from scipy.stats import chisquare
from torch import Tensor, nn

from genas_plugins.darts.genotype import Genotype
from genas_plugins.datasets import ImageTensors, SearchData
from genas_plugins.experiment.scorer import Scorer
from genas_plugins.scoring import angle, flatness
from genas_plugins.search import History, candidate_seed
from nni_strategy.oneshot import UniformPathModule
from nni_strategy.samples import SupernetPaths
from nni_strategy.space import DartsSpace, NasBench201Space
from nni_strategy.strategy import GeNAS
from nni_strategy.training import supernet_evaluator

SMALL: dict[str, Any] = {
    "population": 6,
    "generations": 2,
    "parents": 3,
    "mutants": 2,
    "crossovers": 2,
    "recalibration_images": 16,
    "validation_images": 16,
}
SPACES: dict[str, tuple[Callable[[], ModelSpace], int]] = {
    "DartsSpace": (lambda: DartsSpace(10, 4, 2), 8),
    "NasBench201": (lambda: NasBench201(4, 1, 10), 8),
    "DARTS": (lambda: DARTS(width=4, num_cells=3), 8),
    "ShuffleNetSpace": (lambda: ShuffleNetSpace(num_labels=10), 32),
}


def random_data(size: int = 8, images: int = 32) -> SearchData:
    rng = np.random.default_rng(0)

    def part() -> ImageTensors:
        pixels = torch.from_numpy(rng.integers(0, 256, (images, 3, size, size), dtype=np.uint8))
        return ImageTensors(pixels, torch.from_numpy(rng.integers(0, 10, images)), tuple("0123456789"))

    third = (0.5, 0.5, 0.5)
    return SearchData(part(), part(), part(), None, third, third, 10, "digits", size)


def random_batches(images: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, 3, 8, 8, generator=generator)
    return list(zip(pixels.split(32), (torch.arange(images) % 10).split(32), strict=True))


def small_evaluator(folder: Path, size: int = 8, epochs: int = 1) -> Any:
    return supernet_evaluator(
        random_data(size),
        epochs,
        batch_size=16,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def initialised(strategy: GeNAS, space: ModelSpace, folder: Path) -> GeNAS:
    """The strategy with its supernet, untrained."""
    strategy.initialize(RawFormatModelSpace(space, small_evaluator(folder)), SequentialExecutionEngine())
    return strategy


class Watched(GeNAS):
    """Remembers the supernet as it was when training ended and the search began."""

    before: dict[str, Tensor]

    def search(self) -> None:
        self.before = {name: value.clone() for name, value in self.supernet.state_dict().items()}
        super().search()


@pytest.fixture
def experiment(tmp_path: Path, nothing_in_the_home_folder: None) -> Callable[..., NasExperiment]:
    """Runs an experiment that writes to the temporary folder alone."""

    def run(space: ModelSpace, strategy: GeNAS, size: int = 8) -> NasExperiment:
        config = NasExperimentConfig("sequential", "raw", experiment_working_directory=str(tmp_path))
        made = NasExperiment(space, small_evaluator(tmp_path, size), strategy, config)
        try:
            made.run()
        finally:
            made.stop()
        return made

    return run


@pytest.mark.parametrize("name", SPACES)
def test_exports_the_best_five_of_any_space(
    name: str, experiment: Callable[..., NasExperiment], tmp_path: Path
) -> None:
    build, size = SPACES[name]
    torch.manual_seed(0)
    # The two large spaces are there for what they are made of; how generations follow is the same for all.
    population, generations = (5, 1) if name in ("DARTS", "ShuffleNetSpace") else (6, 2)
    changes = {"population": population, "generations": generations, "sigmas": (2e-3, 1e-2)}
    space, strategy = build(), Watched(**{**SMALL, **changes})
    done = experiment(space, strategy, size)

    scores = [record["score"] for record in strategy.records]
    assert len(scores) == population * generations
    assert all(record["status"] == "ok" and 0 < record["score"] < math.inf for record in strategy.records)
    models = done.export_top_models(top_k=5)
    assert [model.metric for model in models] == sorted(scores, reverse=True)[:5]
    samples = done.export_top_models(top_k=5, formatter="dict")
    assert samples == [model.sample for model in models]
    blank = build()
    assert all(blank.contains(sample) for sample in samples)
    assert len({str(sorted(sample.items())) for sample in samples}) == 5
    for network in done.export_top_models(top_k=5, formatter="instance"):
        assert network(torch.zeros(2, 3, size, size)).shape == (2, 10)

    after = strategy.supernet.state_dict()
    assert after.keys() == strategy.before.keys()
    assert all(torch.equal(value, after[key]) for key, value in strategy.before.items())
    state = get_default_serializer().load(tmp_path / done.id / "checkpoint" / "state.ckpt")
    assert state["strategy"]["evolution"] == strategy.evolution.state_dict()


def test_exported_models_of_the_paper_space_carry_trained_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    strategy = GeNAS(**SMALL)
    evaluator = small_evaluator(tmp_path)
    strategy(RawFormatModelSpace(DartsSpace(10, 4, 2), evaluator), SequentialExecutionEngine())
    images = torch.randn(4, 3, 8, 8)
    for model in strategy.list_models(limit=2):
        network = model.executable_model().eval()
        supernet = strategy.supernet.supernet.eval()
        assert torch.equal(network(images), supernet(images, network.genotype))


def test_same_seed_same_search(tmp_path: Path) -> None:
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        strategy = initialised(GeNAS(**SMALL, seed=seed, sigmas=(2e-3, 1e-2)), NasBench201(4, 1, 10), tmp_path)
        np.random.seed(seed)
        torch.manual_seed(len(results))
        strategy.search()
        results.append([(record["candidate"], record["score"]) for record in strategy.records])
    assert results[0] == results[1]
    assert results[0] != results[2]


@pytest.mark.parametrize("name", ["DartsSpace", "NasBench201"])
def test_search_leaves_the_global_generators_alone(name: str, tmp_path: Path) -> None:
    strategy = initialised(GeNAS(metric="angle+flatness", **SMALL), SPACES[name][0](), tmp_path)
    torch_state, numpy_state, own_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    strategy.search()
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state[1])
    assert random.getstate() == own_state


def plain_statistics(network: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    """Set each normalisation's statistics to the mean of what the batches have, layer by layer."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    sums = {norm: [0.0, 0.0] for norm in norms}

    def count(norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        channels = inputs[0].transpose(0, 1).flatten(1)
        sums[norm][0] += channels.mean(1) / len(batches)
        sums[norm][1] += channels.var(1) / len(batches)

    hooks = [norm.register_forward_pre_hook(count) for norm in norms]
    network.train()
    with torch.no_grad():
        for images, _ in batches:
            network(images)
        for norm, (mean, variance) in sums.items():
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
    for hook in hooks:
        hook.remove()
    network.eval()


def test_scores_are_those_of_standalone_networks(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    train = [(torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8)) for _ in range(2)]
    validation = [(torch.randn(50, 3, 8, 8, generator=generator), torch.arange(50) % 10) for _ in range(2)]
    torch.manual_seed(0)
    settings = {**SMALL, "generations": 1, "recalibration_batches": train, "validation_batches": validation}
    strategy = GeNAS(metric="accuracy", **settings)
    initialised(strategy, DartsSpace(10, 4, 2), tmp_path).search()
    assert len(strategy.records) == 6
    for record in strategy.records:
        network = strategy.supernet.freeze(strategy.supernet.to_sample(Genotype.from_code(record["candidate"])))
        plain_statistics(network, train)
        with torch.no_grad():
            hits = sum((network(images).argmax(1) == labels).sum().item() for images, labels in validation)
        # Ties of logits aside, one image in a hundred is the least difference.
        assert record["score"] == pytest.approx(hits / 100, abs=0.0101)
        assert record["score"] == record["top1"]


@pytest.mark.parametrize("mode", ["cumulative", "hessian"])
def test_noise_goes_on_the_path_alone(tmp_path: Path, mode: str) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8)) for _ in range(2)]
    torch.manual_seed(0)
    strategy = initialised(GeNAS(**SMALL, noise=mode), NasBench201(4, 1, 10), tmp_path)
    candidate = strategy.paths.search_space.sample(np.random.default_rng(0))
    scorer = Scorer(strategy.paths, strategy.score, validation=batches, recalibration=batches, seed=3)
    measured = scorer.measure(candidate)
    frozen = strategy.supernet.freeze(strategy.paths.to_sample(candidate))
    plain_statistics(frozen, batches)
    noise = torch.Generator().manual_seed(candidate_seed(3, strategy.paths.search_space.to_json(candidate)))
    alone = flatness(frozen, batches, (2e-3, 1e-2, 2e-2), noise=mode, generator=noise)
    assert measured.flatness is not None
    assert measured.flatness.losses == pytest.approx(alone.losses, abs=1e-6)


def test_the_first_images_of_the_loaders_are_used(tmp_path: Path) -> None:
    evaluator = small_evaluator(tmp_path)
    torch.manual_seed(0)
    space = NasBench201Space(10, 4, 1)
    implicit = GeNAS(**{**SMALL, "generations": 1, "validation_images": 20, "recalibration_images": 20})
    initialised(implicit, copy.deepcopy(space), tmp_path).search()
    first, second = list(evaluator.train_dataloaders), list(evaluator.val_dataloaders)

    def twenty(batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        (a, b), (c, d) = batches
        return [(a, b), (c[:4], d[:4])]

    batches = {"recalibration_batches": twenty(first), "validation_batches": twenty(second)}
    explicit = GeNAS(**{**SMALL, "generations": 1, **batches})
    initialised(explicit, copy.deepcopy(space), tmp_path).search()
    assert [r["score"] for r in implicit.records] == [r["score"] for r in explicit.records]


def test_angle_and_flatness_of_a_hub_space(tmp_path: Path) -> None:
    torch.manual_seed(0)
    strategy = GeNAS(metric="angle+flatness", **SMALL)
    evaluator = small_evaluator(tmp_path)
    strategy(RawFormatModelSpace(NasBench201(4, 1, 10), evaluator), SequentialExecutionEngine())
    for record in strategy.records:
        assert 0.0 < record["angle"] < 0.5
        # Eq. 5 with gamma 16 and the first sigma.
        expected = record["angle"] + 16.0 * record["flatness"] / record["sigmas"][0]
        assert record["score"] == pytest.approx(expected)
        assert record["shares"]["angle"] + record["shares"]["flatness"] == pytest.approx(1.0)
    assert len({record["angle"] for record in strategy.records}) > 6


def test_angle_of_the_paper_space(tmp_path: Path) -> None:
    torch.manual_seed(0)
    space = DartsSpace(10, 4, 2)
    untrained = copy.deepcopy(space.supernet)
    strategy = GeNAS(metric="angle", **SMALL)
    strategy(RawFormatModelSpace(space, small_evaluator(tmp_path)), SequentialExecutionEngine())
    for record in strategy.records:
        genotype = Genotype.from_code(record["candidate"])
        expected = angle(untrained, space.supernet, genotype) / math.pi
        assert record["score"] == record["angle"] == pytest.approx(expected, abs=1e-12)
        assert expected > 0


def test_a_space_that_is_no_supernet_is_refused() -> None:
    with pytest.raises(TypeError, match="NasBench101 cannot be turned into a weight-sharing supernet"):
        GeNAS().mutate_model(NasBench101(8, num_stacks=1, num_modules_per_stack=1))


class Recorded(SupernetPaths):
    """Keeps the candidates it is told to run, and runs none."""

    fixed: list[Genotype]

    def fix(self, candidate: Genotype) -> None:
        self.fixed.append(candidate)


class Idle(LightningModule):
    def training_step(self, batch: Any, batch_idx: int) -> None: ...

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...


def sampled(seed: int, steps: range, stage: str = "training_step") -> list[Genotype]:
    paths = Recorded(DartsSpace(10, 2, 2))
    paths.fixed = []
    module = UniformPathModule(Idle(), paths, seed)
    for step in steps:
        getattr(module, stage)(None, step)
    return paths.fixed


def test_the_path_is_a_function_of_seed_epoch_and_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    epochs = []
    for epoch in range(2):
        monkeypatch.setattr(UniformPathModule, "current_epoch", epoch)
        first = sampled(0, range(20))
        assert first == sampled(0, range(20))
        # A process that starts in the middle of an epoch goes on with the same paths.
        assert first[12:] == sampled(0, range(12, 20))
        assert first != sampled(1, range(20))
        assert first != sampled(0, range(20), "validation_step")
        assert len(set(first)) == 20
        epochs.append(first)
    assert not set(epochs[0]) & set(epochs[1])


def test_paths_are_uniform() -> None:
    genotypes = sampled(0, range(500))
    # Node 2 has inputs 0 and 1 only, and two operations out of seven: 49 cases.
    counts = Counter(tuple(name for name, _ in sorted(g.normal[:2], key=lambda p: p[1])) for g in genotypes)
    observed = list(counts.values()) + [0] * (49 - len(counts))
    assert chisquare(observed).pvalue > 1e-3
    # Node 5 takes two of five inputs: ten pairs.
    pairs = Counter(tuple(sorted(source for _, source in genotype.reduce[6:])) for genotype in genotypes)
    assert len(pairs) == 10
    assert chisquare(list(pairs.values())).pvalue > 1e-3


class StoppedError(Exception):
    """The search is cut off here."""


@pytest.mark.parametrize(("metric", "records"), [("flatness", 2), ("flatness", 6), ("angle", 9)])
def test_a_search_goes_on_where_its_state_was_taken(metric: str, records: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    space = NasBench201Space(10, 4, 1)
    initial = copy.deepcopy(space)
    whole = initialised(GeNAS(metric=metric, **SMALL), space, tmp_path)
    with torch.no_grad():
        for parameter in space.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    whole.search()

    def stop(record: dict[str, Any]) -> None:
        if record["index"] + 1 == records:
            raise StoppedError

    broken = initialised(GeNAS(metric=metric, on_record=stop, **SMALL), copy.deepcopy(space), tmp_path)
    broken.load_initial_weights(dict(initial.named_parameters()))
    with pytest.raises(StoppedError):
        broken.search()
    torch.save(broken.state_dict(), tmp_path / "state.pt")

    resumed = initialised(GeNAS(metric=metric, **SMALL), copy.deepcopy(space), tmp_path)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    resumed.search()
    assert resumed.evolution.best() == whole.evolution.best()
    assert resumed.evolution.state_dict() == whole.evolution.state_dict()


def test_records_survive_a_resume(tmp_path: Path) -> None:
    torch.manual_seed(0)
    space = NasBench201Space(10, 4, 1)
    whole = initialised(GeNAS(**SMALL), space, tmp_path)
    whole.search()

    def stop(record: dict[str, Any]) -> None:
        if record["index"] == 8:
            raise StoppedError

    broken = initialised(GeNAS(on_record=stop, **SMALL), space, tmp_path)
    with pytest.raises(StoppedError):
        broken.search()
    resumed = initialised(GeNAS(**SMALL), space, tmp_path)
    resumed.load_state_dict(broken.state_dict())
    resumed.search()

    def essence(records: list[dict[str, Any]]) -> list[tuple[int, float]]:
        return [(record["index"], record["score"]) for record in records]

    assert essence(resumed.records) == essence(whole.records)
    # Nothing is left to do: a second call changes nothing.
    resumed.search()
    assert essence(resumed.records) == essence(whole.records)


def test_a_history_spares_the_measurements(tmp_path: Path) -> None:
    torch.manual_seed(0)
    space = NasBench201Space(10, 4, 1)
    first = initialised(GeNAS(history=History(tmp_path / "history.jsonl"), **SMALL), space, tmp_path)
    first.search()
    again = initialised(GeNAS(history=History(tmp_path / "history.jsonl"), **SMALL), space, tmp_path)
    with torch.no_grad():
        # Had anything been measured, it would not be finite.
        for parameter in space.parameters():
            parameter.fill_(math.nan)
    again.search()
    assert again.records == first.records


def test_candidates_without_a_finite_score_are_recorded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    strategy = initialised(GeNAS(**SMALL), DartsSpace(10, 4, 2), tmp_path)
    with torch.no_grad():
        next(strategy.supernet.supernet.classifier.parameters()).fill_(math.nan)
    strategy.search()
    assert {record["status"] for record in strategy.records} == {"failed"}
    assert list(strategy.list_models(limit=3)) == []


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({"recalibration_images": 33}, "needs 33 images for recalibration, .* gives 32"),
        ({"validation_images": 40}, "needs 40 images for validation, .* gives 32"),
    ],
)
def test_too_few_images(settings: dict[str, int], numbers: str, tmp_path: Path) -> None:
    strategy = initialised(GeNAS(**{**SMALL, **settings}), NasBench201(4, 1, 10), tmp_path)
    with pytest.raises(ValueError, match=numbers):
        strategy.search()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "sharpness"}, "Unknown metric 'sharpness'; valid metrics: flatness, angle"),
        ({"sigmas": (1e-2, 2e-3)}, "strictly increasing"),
        ({"sigmas": (1e-2,)}, "at least two"),
        ({"alpha": -1.0}, "alpha"),
        ({"noise": "loud"}, "cumulative, independent, shared"),
        ({"where": "stem"}, "all, cells"),
        ({"recalibration_momentum": 0.0}, "momentum"),
        ({"population": 10, "mutants": 6, "crossovers": 5}, "population of 10"),
        ({"generations": 0}, "generations"),
        ({"mutation_probability": 0.0}, "mutation_probability"),
        ({"recalibration_images": -1}, "recalibration_images"),
        ({"validation_images": -1}, "validation_images"),
        ({"in_flight": 0}, "in_flight must be at least 1"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeNAS(**settings)


def test_before_an_experiment_there_is_no_supernet() -> None:
    with pytest.raises(RuntimeError, match="before an experiment"):
        _ = GeNAS().paths


def test_models_are_listed_by_score_only(tmp_path: Path) -> None:
    strategy = initialised(GeNAS(**SMALL), NasBench201(4, 1, 10), tmp_path)
    with pytest.raises(ValueError, match="sort must be true"):
        next(strategy.list_models(sort=False))


def test_repr_names_the_settings() -> None:
    assert "metric='angle'" in repr(GeNAS(metric="angle"))


def test_a_choice_of_channels_is_searched_too(tmp_path: Path) -> None:
    class Widths(ModelSpace):
        def __init__(self) -> None:
            super().__init__()
            channels = nni.choice("channels", [4, 6, 8])
            self.first = MutableConv2d(3, channels, nni.choice("kernel", [1, 3]), padding="same", bias=False)
            self.norm = MutableBatchNorm2d(channels)
            self.blocks = Repeat(lambda index: nn.Sequential(nn.ReLU(), nn.Identity()), (1, 3), label="depth")
            self.second = MutableConv2d(channels, 10, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.blocks(self.norm(self.first(x)))).mean((2, 3))

    torch.manual_seed(0)
    strategy = GeNAS(**SMALL)
    strategy(RawFormatModelSpace(Widths(), small_evaluator(tmp_path)), SequentialExecutionEngine())
    assert len({model.metric for model in strategy.list_models(limit=5)}) > 1


@pytest.mark.parametrize(
    ("build", "settings"),
    [
        (lambda: DartsSpace(10, 4, 2), {"metric": "angle+flatness", "generations": 1}),
        (lambda: NasBench201Space(10, 4, 1), {"common": True}),
        (lambda: NasBench201Space(10, 4, 1), {"racing": 0.9, "population": 8}),
    ],
)
def test_candidates_in_flight_have_the_scores_of_one_after_another(
    build: Callable[[], ModelSpace], settings: dict[str, Any], tmp_path: Path
) -> None:
    found = []
    for in_flight in (1, 3):
        torch.manual_seed(0)
        images = {"validation_images": None, "validation_batches": random_batches(96)}
        strategy = GeNAS(**{**SMALL, **images, **settings}, in_flight=in_flight, device="cpu")
        initialised(strategy, build(), tmp_path)
        before = {name: value.clone() for name, value in strategy.supernet.state_dict().items()}
        generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        strategy.search()
        assert torch.equal(generators[0], torch.get_rng_state())
        assert generators[1:] == (random.getstate(), np.random.get_state()[1].tolist())
        assert all(torch.equal(value, before[name]) for name, value in strategy.supernet.state_dict().items())
        found.append([{key: value for key, value in record.items() if key != "seconds"} for record in strategy.records])
    assert found[0] == found[1]


def test_paths_that_are_fixed_in_the_supernet_are_not_measured_at_a_time(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"NasBench201 is measured with one path fixed .* in_flight must be 1"):
        initialised(GeNAS(**SMALL, in_flight=2), NasBench201(4, 1, 10), tmp_path)
