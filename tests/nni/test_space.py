"""DartsSpace: genotypes as NNI samples, the supernet behind NNI's protocol, frozen and fixed networks."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from nni.mutable import SampleValidationError
from nni.nas.evaluator import FunctionalEvaluator
from nni.nas.evaluator.pytorch import Classification, DataLoader
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.experiment import NasExperiment
from nni.nas.experiment.config import NasExperimentConfig, SequentialEngineConfig
from nni.nas.space import RawFormatModelSpace, model_context
from nni.nas.strategy import Random, RandomOneShot
from torch import nn
from torch.utils.data import TensorDataset

from genas_plugins.darts.genotype import NODES, OPERATIONS, Genotype
from genas_plugins.darts.network import CellNetwork
from genas_plugins.scoring import angle
from genas_plugins.spaces import DartsSearchSpace
from nni_strategy.space import DartsSpace, genotype_to_sample, sample_to_genotype


@pytest.fixture
def space() -> DartsSpace:
    torch.manual_seed(0)
    return DartsSpace(num_classes=10, init_channels=4, num_cells=3)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def genotypes() -> list[Genotype]:
    rng = np.random.default_rng(0)
    return [DartsSearchSpace().sample(rng) for _ in range(200)]


def used_edges(sample: dict) -> set[tuple[str, int, int, str]]:
    """The edges of a sample as (cell, node, input, operation), read from the labels alone."""
    return {
        (cell, node, source, sample[f"{cell}/op_{node}_{position}"])
        for cell in ("normal", "reduce")
        for node in NODES
        for position, source in enumerate(sample[f"{cell}/inputs_{node}"])
    }


def test_samples_and_genotypes_convert_both_ways(space: DartsSpace, genotypes: list[Genotype]) -> None:
    for genotype in genotypes:
        sample = genotype_to_sample(genotype)
        assert space.contains(sample)
        assert sample_to_genotype(sample) == genotype
        edges = {
            (name, NODES[position // 2], source, operation)
            for name, cell in (("normal", genotype.normal), ("reduce", genotype.reduce))
            for position, (operation, source) in enumerate(cell)
        }
        assert used_edges(sample) == edges
    assert len(set(genotypes)) == 200


def test_order_of_published_pairs_does_not_matter() -> None:
    cell = (("skip_connect", 1), ("sep_conv_3x3", 0)) * 4
    sample = genotype_to_sample(Genotype(cell, cell))
    assert sample["normal/inputs_2"] == [0, 1]
    assert sample["normal/op_2_0"] == "sep_conv_3x3"
    assert sample["normal/op_2_1"] == "skip_connect"


def test_nni_samples_become_genotypes_and_come_back(space: DartsSpace) -> None:
    state = np.random.RandomState(0)
    for _ in range(50):
        sample: dict = {}
        for mutable in space.simplify().values():
            mutable.random(sample, state)
        genotype = sample_to_genotype(sample)
        for cell in (genotype.normal, genotype.reduce):
            for position, node in enumerate(NODES):
                first, second = (source for _, source in cell[2 * position : 2 * position + 2])
                assert first != second
                assert min(first, second) >= 0 and max(first, second) < node
        assert genotype_to_sample(genotype) == sample


def test_size_of_the_simplified_space(space: DartsSpace) -> None:
    sizes = []
    for label, mutable in space.simplify().items():
        if "/op_" in label:
            assert list(mutable.values) == list(OPERATIONS[1:])
            sizes.append(7)
        else:
            assert mutable.n_chosen == 2
            sizes.append(math.comb(len(mutable.values), 2))
    assert len(sizes) == 2 * (4 + 8)
    # 2 cells x (1 x 3 x 6 x 10 pairs of inputs x 7^8 operations).
    assert math.prod(sizes) == (180 * 7**8) ** 2 == DartsSearchSpace().size


def test_nni_random_gives_a_working_network(space: DartsSpace, images: torch.Tensor) -> None:
    sample: dict = {}
    network = space.random(memo=sample, random_state=np.random.RandomState(0))
    assert space.contains(sample)
    assert sample_to_genotype(sample) == network.genotype
    assert network(images).shape == (4, 10)


def test_freeze_keeps_the_weights(space: DartsSpace, images: torch.Tensor, genotypes: list[Genotype]) -> None:
    with torch.no_grad():
        # Statistics other than mean 0 and variance 1, so that a lost buffer would show.
        for genotype in genotypes[:5]:
            space.supernet(images, genotype)
    space.eval()
    for genotype in genotypes[:10]:
        frozen = space.freeze(genotype_to_sample(genotype))
        assert torch.equal(frozen(images), space.supernet(images, genotype))


def test_training_a_frozen_network_leaves_the_supernet(
    space: DartsSpace, images: torch.Tensor, genotypes: list[Genotype]
) -> None:
    frozen = space.freeze(genotype_to_sample(genotypes[0])).train()
    before = {name: value.clone() for name, value in space.state_dict().items()}
    own = [parameter.clone() for parameter in frozen.parameters()]
    optimizer = torch.optim.SGD(frozen.parameters(), 0.1)
    nn.functional.cross_entropy(frozen(images), torch.arange(4)).backward()
    optimizer.step()
    assert not all(torch.equal(a, b) for a, b in zip(own, frozen.parameters(), strict=True))
    assert all(torch.equal(value, before[name]) for name, value in space.state_dict().items())
    assert all(parameter.grad is None for parameter in space.parameters())


def test_freeze_refuses_what_is_not_in_the_space(space: DartsSpace, genotypes: list[Genotype]) -> None:
    sample = genotype_to_sample(genotypes[0])
    with pytest.raises(SampleValidationError):
        space.freeze({**sample, "normal/op_2_0": "none"})
    with pytest.raises(SampleValidationError):
        space.freeze({**sample, "normal/inputs_3": [1, 1]})


def test_a_missing_label_is_named(genotypes: list[Genotype]) -> None:
    sample = genotype_to_sample(genotypes[0])
    del sample["reduce/op_4_1"]
    with pytest.raises(KeyError, match="reduce/op_4_1"):
        sample_to_genotype(sample)


def test_a_sample_with_an_unknown_operation_is_refused(genotypes: list[Genotype]) -> None:
    sample = {**genotype_to_sample(genotypes[0]), "normal/op_2_0": "conv_1x1"}
    with pytest.raises(ValueError, match="conv_1x1"):
        sample_to_genotype(sample)


def pooling_followed_by_normalisation(module: nn.Module) -> bool:
    for child in module.modules():
        for first, second in itertools.pairwise(child.children()):
            pools = isinstance(first, nn.MaxPool2d | nn.AvgPool2d)
            if pools and isinstance(second, nn.BatchNorm2d):
                return True
    return False


def test_under_a_model_context_it_is_a_fixed_network(images: torch.Tensor) -> None:
    cell = (("max_pool_3x3", 0), ("avg_pool_3x3", 1)) * 4
    genotype = Genotype(cell, cell)
    sample = genotype_to_sample(genotype)
    with model_context(sample):
        fixed = DartsSpace(10, 4, 3)
    assert isinstance(fixed.network, CellNetwork)
    assert fixed(images).shape == (4, 10)
    assert not fixed.simplify()
    assert not pooling_followed_by_normalisation(fixed)
    # A genotype of poolings alone: what is left are stem, classifier and the two preprocessings of each cell.
    expected = CellNetwork(genotype, init_channels=4, num_cells=3, num_classes=10, stem="cifar")
    assert sum(p.numel() for p in fixed.parameters()) == sum(p.numel() for p in expected.parameters())
    # The supernet does normalise after pooling.
    assert pooling_followed_by_normalisation(DartsSpace(10, 4, 3).freeze(sample))


def test_a_fixed_space_has_no_supernet(genotypes: list[Genotype]) -> None:
    with model_context(genotype_to_sample(genotypes[0])):
        fixed = DartsSpace(10, 4, 3)
    with pytest.raises(AttributeError):
        _ = fixed.supernet


def test_frozen_factory_gives_fresh_weights(genotypes: list[Genotype], images: torch.Tensor) -> None:
    network = DartsSpace.frozen_factory(genotype_to_sample(genotypes[0]))(10, 4, 3)
    assert isinstance(network.network, CellNetwork)
    assert network(images).shape == (4, 10)


def test_angle_to_earlier_weights(space: DartsSpace, genotypes: list[Genotype]) -> None:
    earlier = copy.deepcopy(space)
    untrained, states = earlier.supernet, [dict(earlier.named_parameters()), earlier.state_dict()]
    with torch.no_grad():
        for parameter in space.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    state = torch.get_rng_state()
    for initial in states:
        for genotype in genotypes[:3]:
            expected = angle(untrained, space.supernet, genotype) / math.pi
            assert expected > 0
            assert space.angle(initial, genotype) == pytest.approx(expected, abs=1e-12)
    # Of other weights, another angle: nothing is remembered too long.
    assert space.angle(space.state_dict(), genotypes[0]) == pytest.approx(0.0, abs=1e-7)
    assert torch.equal(torch.get_rng_state(), state)


def test_angle_to_incomplete_weights(space: DartsSpace, genotypes: list[Genotype]) -> None:
    initial = space.state_dict()
    del initial["network.supernet.classifier.weight"]
    with pytest.raises(ValueError, match=r"lack 1 of \d+ parameters, for instance .*classifier.weight"):
        space.angle(initial, genotypes[0])


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="init_channels"):
        DartsSpace(init_channels=3, num_cells=3)
    with pytest.raises(ValueError, match="stem"):
        DartsSpace(init_channels=4, num_cells=3, stem="mnist")  # type: ignore[arg-type]


def test_nni_random_one_shot_trains_it(space: DartsSpace, images: torch.Tensor, tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(images, torch.arange(4)), batch_size=2)
    evaluator = Classification(
        num_classes=10,
        train_dataloaders=loader,
        val_dataloaders=loader,
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    before = [parameter.clone() for parameter in space.parameters()]
    strategy = RandomOneShot()
    strategy(RawFormatModelSpace(space, evaluator), SequentialExecutionEngine())
    moved = [not torch.equal(a, b) for a, b in zip(before, space.parameters(), strict=True)]
    assert any(moved)
    assert not all(moved)
    (found,) = strategy.list_models()
    frozen = found.executable_model()
    assert frozen.genotype == sample_to_genotype(found.sample)
    assert torch.equal(frozen.eval()(images), space.supernet.eval()(images, frozen.genotype))


def share_of_convolutions(model: DartsSpace) -> None:
    """A stand-in for training: the score of a network is its share of convolutions."""
    import nni

    genotype = model.network.genotype
    operations = [name for name, _ in (*genotype.normal, *genotype.reduce)]
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 10)
    nni.report_final_result(sum("conv" in name for name in operations) / len(operations))


@pytest.mark.usefixtures("nothing_in_the_home_folder")
def test_multi_trial_random_in_one_process(space: DartsSpace, tmp_path: Path) -> None:
    config = NasExperimentConfig(
        SequentialEngineConfig(max_model_count=4), "simplified", experiment_working_directory=str(tmp_path)
    )
    evaluator = FunctionalEvaluator(share_of_convolutions)
    experiment = NasExperiment(space, evaluator, Random(seed=0), config)
    try:
        experiment.run()
        best = experiment.export_top_models(4)
    finally:
        experiment.stop()
    assert len(best) == 4
    for model in best:
        edges = used_edges(model.sample)
        assert model.metric == sum("conv" in name for *_, name in edges) / 16
    assert [model.metric for model in best] == sorted((model.metric for model in best), reverse=True)
