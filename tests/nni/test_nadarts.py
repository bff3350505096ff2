"""NA-DARTS: NNI's DARTS at distance 0, gradients against brute force, broad optima, genotypes, resuming, refusals."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from nni.mutable import Categorical, MutableExpression
from nni.nas.evaluator.pytorch import Classification, DataLoader, Lightning, LightningModule, Trainer
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.experiment import NasExperiment
from nni.nas.experiment.config import NasExperimentConfig
from nni.nas.hub import pytorch as hub
from nni.nas.nn.pytorch import LayerChoice, ModelSpace
from nni.nas.profiler import ExpressionProfiler
from nni.nas.space import RawFormatModelSpace
from nni.nas.strategy import DARTS, GumbelDARTS
from pytorch_lightning.callbacks import ModelCheckpoint
from scipy.stats import chisquare
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from genas_plugins.darts.genotype import NODES, OPERATIONS
from genas_plugins.datasets import ImageTensors, SearchData
from genas_plugins.nasbench201.architecture import OPERATIONS as OPERATIONS_201
from genas_plugins.scoring import CombinedScore, NeighbourhoodScore
from genas_plugins.spaces import NasBench201Architecture, NasBench201SearchSpace
from nni_strategy import DartsSpace, GeNAS, NADarts, NasBench201Space, genotype_from_hub, supernet_evaluator
from nni_strategy.nadarts_step import Moves, aggregate_gradient
from nni_strategy.samples import SupernetPaths

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def initialised(strategy: DARTS, space: ModelSpace, evaluator: Any) -> Any:
    strategy.initialize(RawFormatModelSpace(space, evaluator), SequentialExecutionEngine())
    return strategy


def classification(images: int = 16, **trainer: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(images, 3, 8, 8, generator=generator)
    labels = torch.arange(images) % 10
    loaders = [DataLoader(TensorDataset(part, labels), batch_size=8) for part in (pixels, -pixels)]
    arguments = {"max_epochs": 1, "enable_checkpointing": False, **QUIET, **trainer}
    return Classification(
        learning_rate=0.01, train_dataloaders=loaders[0], val_dataloaders=loaders[1], num_classes=10, **arguments
    )


class Basis(nn.Module):
    """An operation that gives one row of the identity, whatever it is given."""

    def __init__(self, number: int, size: int) -> None:
        super().__init__()
        self.register_buffer("row", torch.eye(size)[number])

    def forward(self, x: Tensor) -> Tensor:
        return self.row


class Landscape(ModelSpace):
    """The loss of every pair of operations, from a table; its mixture is exp(c p' T q) in closed form."""

    def __init__(self, table: Tensor, curved: float = 0.3) -> None:
        super().__init__()
        for name, size in zip(("first", "second"), table.shape, strict=True):
            setattr(self, name, LayerChoice([Basis(number, size) for number in range(size)], label=name))
        self.register_buffer("table", table)
        self.weight = nn.Parameter(torch.zeros(1))
        self.curved = curved

    def forward(self, x: Tensor) -> Tensor:
        return value(self.table, self.first(x), self.second(x), self.curved) + 0 * self.weight.sum()


def value(table: Tensor, p: Tensor, q: Tensor, curved: float) -> Tensor:
    return torch.exp(curved * (p @ table @ q)) / curved


class OwnLoss(LightningModule):
    """Whatever the network gives is the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.model(batch[0])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Recorder(pl.Callback):
    """The gradients with which the architecture is moved."""

    def __init__(self) -> None:
        self.gradients: list[list[Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if getattr(optimizer, "is_arch_optimizer", False):
            rows = (parameter.grad for group in optimizer.param_groups for parameter in group["params"])
            self.gradients.append([row.clone() for row in rows])


def walk(strategy: DARTS, table: Tensor, start: list[Tensor], steps: int = 1, curved: float = 0.3) -> tuple[Any, ...]:
    """Run so many steps from these architecture parameters; the Lightning module and what was recorded."""
    recorder = Recorder()
    trainer = Trainer(max_epochs=1, enable_checkpointing=False, callbacks=[recorder], **QUIET)
    loader = DataLoader(TensorDataset(torch.zeros(steps, 1)), batch_size=1)
    module = OwnLoss()
    initialised(strategy, Landscape(table, curved), Lightning(module, trainer, loader, loader))
    with torch.no_grad():
        for label, alpha in zip(("first", "second"), start, strict=True):
            strategy._arch_parameters[label].copy_(alpha)
    strategy.run()
    return module, recorder.gradients


def random_landscape(seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, generator=generator), [torch.randn(size, generator=generator) for size in (4, 3)]


def neighbours(alphas: list[Tensor], distance: int) -> Iterator[list[Tensor]]:
    """All distributions by their definition, with permutation matrices; that of nothing moved is the first."""
    for moves in itertools.product(*(range(len(alpha)) for alpha in alphas)):
        if sum(move > 0 for move in moves) <= distance:
            yield [
                torch.from_numpy(np.roll(np.eye(len(alpha), dtype=np.float32), move, 0)) @ alpha.softmax(0)
                for alpha, move in zip(alphas, moves, strict=True)
            ]


def objective(table: Tensor, alphas: list[Tensor], distance: int, aggregate: str, include_self: bool = True) -> Tensor:
    found = torch.stack([value(table, *pair, curved=0.3) for pair in neighbours(alphas, distance)])
    found = found if include_self else found[1:]
    spread = ((found - found.mean()) ** 2).mean().sqrt() if aggregate == "mean-std" else 0.0
    functions = {"mean": torch.mean, "min": torch.max, "median": lambda losses: losses.quantile(0.5)}
    total = functions.get(aggregate, torch.mean)(found) + spread
    # As neighbourhoods of single architectures are scored, by the negative loss.
    score = NeighbourhoodScore(CombinedScore(), aggregate).of((-found).tolist())
    assert float(total.detach()) == pytest.approx(-score, rel=1e-5)
    return total


def gradient_of(function: Callable[[list[Tensor]], Tensor], start: list[Tensor]) -> list[Tensor]:
    alphas = [alpha.clone().requires_grad_() for alpha in start]
    return list(torch.autograd.grad(function(alphas), alphas))


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("aggregate", ["mean", "median", "min", "mean-std"])
@pytest.mark.parametrize("distance", [1, 2])
def test_gradients_are_those_of_all_neighbours_by_brute_force(distance, aggregate, include_self):
    table, start = random_landscape()
    strategy = NADarts(distance=distance, size=None, aggregate=aggregate, include_self=include_self)
    _, (gradient,) = walk(strategy, table, start)
    # 3 + 2 of one choice, 3 x 2 of both.
    assert strategy.moves.count == {1: 5, 2: 11}[distance]
    expected = gradient_of(lambda alphas: objective(table, alphas, distance, aggregate, include_self), start)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_a_sample_of_neighbours_has_their_gradient_on_average():
    table, start = random_landscape(1)
    # A learning rate that does not move the architecture: all steps are taken from the start.
    strategy = NADarts(distance=1, size=2, include_self=False, arc_learning_rate=1e-12)
    _, gradients = walk(strategy, table, start, steps=100)
    assert len({tuple(rows[0].tolist()) for rows in gradients}) > 5
    expected = gradient_of(lambda alphas: objective(table, alphas, 1, "mean", False), start)
    for number, row in enumerate(expected):
        found = torch.stack([rows[number] for rows in gradients])
        error = found.std(0) / len(gradients) ** 0.5
        assert ((found.mean(0) - row).abs() < 4 * error).all()


def test_neighbours_of_a_discrete_architecture_have_other_operations():
    """Distributions of 0 and 1: the losses are the table's entries in the row and the column of the architecture."""
    table, _ = random_landscape()
    start = [80.0 * torch.eye(4)[2], 80.0 * torch.eye(3)[1]]
    module, _ = walk(NADarts(distance=1, size=None), table, start)
    others = [table[row, 1] for row in (0, 1, 3)] + [table[2, column] for column in (0, 2)]
    expected = sorted(float(torch.exp(0.3 * entry) / 0.3) for entry in [table[2, 1], *others])
    # The last is the step of the weights.
    assert sorted(module.losses[:-1]) == pytest.approx(expected, rel=1e-5)
    assert module.losses[-1] == pytest.approx(float(torch.exp(0.3 * table[2, 1]) / 0.3), rel=1e-5)


def test_neighbours_in_nasbench201_are_its_24_architectures():
    torch.manual_seed(0)
    strategy = initialised(NADarts(distance=1), NasBench201Space(10, 4, 1), classification())
    # None of its neighbours computes the same as another.
    architecture = NasBench201Architecture(6 * ("nor_conv_3x3",))
    space, images = strategy.supernet.eval(), torch.randn(2, 3, 8, 8)
    alphas = space.network.arch_parameters()
    with torch.no_grad():
        for alpha, name in zip(alphas, architecture.operations, strict=True):
            alpha.copy_(80.0 * torch.tensor([name == other for other in OPERATIONS_201]))
    assert strategy.architecture == architecture
    found = []
    for number in range(1, strategy.moves.count + 1):
        with strategy.softmax.by(alphas, strategy.moves.of(number)), torch.no_grad():
            found.append(space(images))
    with torch.no_grad():
        paths = [space.supernet(images, other) for other in NasBench201SearchSpace().neighbours(architecture)]
    assert len(found) == len(paths) == 24
    nearest = [min(range(24), key=lambda other: float((logits - paths[other]).abs().max())) for logits in found]
    assert sorted(nearest) == list(range(24))
    for logits, other in zip(found, nearest, strict=True):
        torch.testing.assert_close(logits, paths[other], rtol=1e-4, atol=1e-5)


def test_an_even_mixture_has_the_direction_of_darts():
    """All 6 neighbours are the mixture itself; moved by each k, the gradients of a choice add up to less than none."""
    table = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    start = [torch.zeros(4), torch.zeros(4)]
    _, (gradient,) = walk(NADarts(distance=1, size=None), table, start)
    darts = gradient_of(lambda alphas: objective(table, alphas, 0, "mean"), start)
    # 1 for the mixture, 3 for the moves of the other choice, -1 for those of its own; of 7.
    torch.testing.assert_close(gradient, [3 / 7 * row for row in darts], rtol=1e-4, atol=1e-7)


def hand(start: list[Tensor], step: float, direction: list[Tensor]) -> list[Tensor]:
    return [alpha + step * row for alpha, row in zip(start, direction, strict=True)]


@pytest.mark.parametrize("distance", [0, 1])
@pytest.mark.parametrize("ascent", ["a2m", "sam"])
def test_a2m_steps_up_before_it_steps_down(ascent, distance):
    table, start = random_landscape(2)

    def loss(alphas: list[Tensor]) -> Tensor:
        return objective(table, alphas, distance, "mean")

    rho = 0.2
    _, (gradient,) = walk(NADarts(distance=distance, size=None, rho=rho, ascent=ascent), table, start)
    up = gradient_of(loss, start)
    if ascent == "sam":
        length = sum(float((row**2).sum()) for row in up) ** 0.5
        expected = gradient_of(loss, hand(start, rho / length, up))
    else:
        # The whole derivative of the loss where the step up ends, through the step itself.
        alphas = [alpha.clone().requires_grad_() for alpha in start]
        inner = torch.autograd.grad(loss(alphas), alphas, create_graph=True)
        expected = list(torch.autograd.grad(loss(hand(alphas, rho, list(inner))), alphas))
    # The published code's central difference stands for the second derivative.
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(gradient[0], up[0], rtol=1e-2)


def test_a2m_leaves_the_architecture_where_it_was():
    table, start = random_landscape(2)
    strategy = NADarts(distance=0, rho=0.5, arc_learning_rate=1e-12)
    walk(strategy, table, start, steps=3)
    for label, alpha in zip(("first", "second"), start, strict=True):
        torch.testing.assert_close(strategy._arch_parameters[label].detach(), alpha)


class Cost(ExpressionProfiler):
    """5 for the third operation of the first choice, 1 for the others."""

    def __init__(self) -> None:
        choice = Categorical([0, 1, 2, 3], label="first")
        self.expression = MutableExpression.condition(choice == 2, 5.0, 1.0)

    def profile(self, sample: dict[str, Any]) -> float:
        return self.expression.freeze(sample)


def test_a_neighbour_has_the_penalty_of_its_own_costs():
    table, start = random_landscape()
    penalty = {"profiler": Cost(), "baseline": 2.0, "aggregate": "mul"}
    _, (gradient,) = walk(NADarts(distance=1, size=None, penalty=penalty), table, start)

    def loss(alphas: list[Tensor]) -> Tensor:
        # To NNI the expected costs are a number, which has no gradient.
        costs = [(5 * p[2] + (1 - p[2])).detach() for p, _ in neighbours(alphas, 1)]
        losses = [value(table, *pair, curved=0.3) for pair in neighbours(alphas, 1)]
        return sum(cost / 2 * one for cost, one in zip(costs, losses, strict=True)) / len(losses)

    torch.testing.assert_close(gradient, gradient_of(loss, start), rtol=1e-4, atol=1e-6)


@pytest.fixture
def sharp_and_broad() -> Tensor:
    """The best pair, (0, 0), has the worst neighbours; of the block of nine each is nearly as good as the others."""
    table = torch.zeros(6, 6)
    table[0], table[:, 0] = 1.0, 1.0
    table[3:, 3:] = -1.0
    table[0, 0] = -2.0
    return table


@pytest.mark.parametrize(
    ("strategy", "broad"),
    [
        (DARTS(arc_learning_rate=0.1), False),
        (NADarts(distance=0, arc_learning_rate=0.1), False),
        (NADarts(distance=1, size=None, arc_learning_rate=0.1), True),
        (NADarts(distance=1, size=4, arc_learning_rate=0.1), True),
        (NADarts(distance=1, size=None, aggregate="min", arc_learning_rate=0.1), True),
        (NADarts(distance=1, size=None, aggregate="mean-std", arc_learning_rate=0.1), True),
        (NADarts(distance=1, size=None, aggregate="median", arc_learning_rate=0.1), True),
    ],
    ids=repr,
)
def test_neighbours_lead_from_the_sharp_optimum_to_the_broad_one(strategy, broad, sharp_and_broad):
    # Closer to the sharp optimum than to any other pair.
    start = [1.5 * torch.eye(6)[0] for _ in range(2)]
    walk(strategy, sharp_and_broad, start, steps=60, curved=1e-3)
    sample = strategy.oneshot_module.export()
    pair = int(sample["first"]), int(sample["second"])
    assert float(sharp_and_broad[pair]) == (-1.0 if broad else -2.0), sample


SPACES: dict[str, Callable[[], ModelSpace]] = {
    "DartsSpace": lambda: DartsSpace(10, 4, 3),
    "NasBench201Space": lambda: NasBench201Space(10, 4, 1),
    "hub's DARTS": lambda: hub.DARTS(width=4, num_cells=3),
    "hub's NasBench201": lambda: hub.NasBench201(4, 1, 10),
}


NONE = [*((space, {"distance": 0}) for space in SPACES), ("NasBench201Space", {"size": 0})]


@pytest.mark.parametrize(("space", "none"), NONE)
def test_without_neighbours_it_is_nnis_darts_to_the_last_bit(space, none):
    states = []
    settings = {"arc_learning_rate": 0.01, "gradient_clip_val": 5.0}
    for kind in (DARTS(**settings), NADarts(**none, seed=3, **settings)):
        torch.manual_seed(0)
        fresh = SPACES[space]()
        with torch.random.fork_rng():
            # NNI's DARTS draws from the global generator.
            torch.manual_seed(3)
            strategy = initialised(kind, fresh, classification())
        strategy.run()
        optimizers = strategy.oneshot_module.trainer.optimizers
        moments = {id(parameter): state for optimizer in optimizers for parameter, state in optimizer.state.items()}
        names = dict(strategy.oneshot_module.named_parameters())
        states.append(
            {
                **strategy.oneshot_module.state_dict(),
                **{
                    f"{name}.{key}": moment
                    for name, parameter in names.items()
                    for key, moment in moments.get(id(parameter), {}).items()
                },
            }
        )
    theirs, ours = states
    alphas = [name for name in theirs if "_arch_alpha" in name and name.endswith(".exp_avg")]
    assert len(alphas) == {"D": 28, "N": 6}[space.removeprefix("hub's ")[0]]
    assert theirs.keys() == ours.keys()
    assert [name for name in theirs if not torch.equal(theirs[name], ours[name])] == []


def genotype_of(weights: dict[str, list[float]]) -> set[tuple[str, str, int, int]]:
    """DARTS's rule on the probabilities that are exported."""
    kept = set()
    for cell, node in itertools.product(("normal", "reduce"), NODES):
        rows = {source: weights[f"{cell}/{source}_{node}"] for source in range(node)}
        best = {source: max(OPERATIONS[1:], key=row.__getitem__) for source, row in rows.items()}
        order = sorted(rows, key=lambda source: rows[source][best[source]])
        kept |= {(cell, best[source], source, node) for source in order[-2:]}
    return kept


def test_a_search_of_darts_ends_with_a_genotype(tmp_path, nothing_in_the_home_folder):
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        strategy = NADarts(distance=1, size=1, arc_learning_rate=0.1, gradient_clip_val=5.0, seed=seed)
        config = NasExperimentConfig("sequential", "raw", experiment_working_directory=str(tmp_path))
        experiment = NasExperiment(DartsSpace(10, 4, 3), classification(8), strategy, config)
        experiment.run()
        (model,) = experiment.export_top_models(top_k=1)
        network = model.executable_model()
        assert network.genotype == strategy.architecture
        cells = (("normal", network.genotype.normal), ("reduce", network.genotype.reduce))
        edges = {(cell, *pair, NODES[number // 2]) for cell, gene in cells for number, pair in enumerate(gene)}
        assert edges == genotype_of(strategy.oneshot_module.export_probs())
        assert network(torch.randn(2, 3, 8, 8)).shape == (2, 10)
        found.append(network.genotype)
        experiment.stop()
    assert found[0] == found[1] != found[2]


def test_a_search_of_the_hubs_darts_ends_with_a_genotype(caplog):
    torch.manual_seed(0)
    space = hub.DARTS(width=4, num_cells=3)
    strategy = initialised(NADarts(distance=1, size=1, arc_learning_rate=0.1), space, classification(8))
    strategy.run()
    (model,) = strategy.list_models(limit=3)
    assert "finds one architecture, but 3 are asked for" in caplog.text
    assert strategy.architecture == genotype_from_hub(model.sample)
    # The mixture in which the chosen edges have one operation and the others none, which is the last.
    network, images = model.executable_model().eval(), torch.randn(2, 3, 8, 8)
    chosen = {
        (cell, node, source): name
        for cell in ("normal", "reduce")
        for position, (name, source) in enumerate(getattr(strategy.architecture, cell))
        for node in [NODES[position // 2]]
    }
    for module in space.modules():
        for label, alpha in getattr(module, "_arch_alpha", {}).items():
            cell, node, source = re.fullmatch(r"(\w+)/(\d)_(\d)", label).groups()
            name = chosen.get((cell, int(node), int(source)))
            number = len(alpha) - 1 if name is None else module.op_names.index(name)
            alpha.data = 80.0 * torch.eye(len(alpha))[number]
    with torch.no_grad():
        torch.testing.assert_close(network(images), space.eval()(images))


def test_what_is_found_in_layer_choices_has_their_weights():
    torch.manual_seed(0)
    space = hub.NasBench201(4, 1, 10)
    strategy = initialised(NADarts(), space, classification(8))
    strategy.run()
    (model,) = strategy.list_models()
    for module in space.modules():
        if hasattr(module, "_arch_alpha"):
            module._arch_alpha.data = 80.0 * torch.eye(5)[module.names.index(model.sample[module.label])]
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model.executable_model().eval()(images), space.eval()(images))


class StoppedError(Exception):
    """The search is cut off here."""


class Stop(pl.Callback):
    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1 and batch_idx == 1:
            raise StoppedError


class EveryEpoch(ModelCheckpoint):
    """Lightning also saves when an exception ends a training, which it cannot do when it is killed."""

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        pass


def resumable(folder: Path, *callbacks: pl.Callback) -> tuple[ModelSpace, Any]:
    rng = np.random.default_rng(0)
    parts = [
        ImageTensors(
            torch.from_numpy(rng.integers(0, 256, (32, 3, 8, 8), dtype=np.uint8)),
            torch.from_numpy(rng.integers(0, 10, 32)),
            tuple("0123456789"),
        )
        for _ in range(3)
    ]
    half = (0.5, 0.5, 0.5)
    saving = EveryEpoch(folder, "search", save_on_train_epoch_end=True, enable_version_counter=False)
    evaluator = supernet_evaluator(
        SearchData(*parts, None, half, half, 10, "digits", 8),
        3,
        batch_size=16,
        gradient_clip=0,
        callbacks=[saving, *callbacks],
        **QUIET,
    )
    torch.manual_seed(0)
    return NasBench201Space(10, 4, 1), evaluator


@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_a_search_goes_on_where_it_was_cut_off(rho, tmp_path):
    settings = {"distance": 1, "size": 2, "rho": rho, "arc_learning_rate": 0.05, "gradient_clip_val": 5.0}
    whole = initialised(NADarts(**settings), *resumable(tmp_path / "whole"))
    whole.run()
    broken = initialised(NADarts(**settings), *resumable(tmp_path / "broken", Stop()))
    with pytest.raises(StoppedError):
        broken.run()
    torch.save(broken.state_dict(), tmp_path / "state.pt")

    resumed = initialised(NADarts(**settings), *resumable(tmp_path / "broken"))
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    # Nothing of what was drawn anew may be left.
    with torch.no_grad():
        for parameter in resumed.oneshot_module.parameters():
            parameter.fill_(torch.nan)
    resumed.run()
    assert resumed.architecture == whole.architecture
    before, after = (strategy.oneshot_module.state_dict() for strategy in (whole, resumed))
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    before, after = (strategy.oneshot_module.trainer.optimizers for strategy in (whole, resumed))
    for first, second in zip(before, after, strict=True):
        one, other = first.state_dict()["state"], second.state_dict()["state"]
        assert one.keys() == other.keys() and one
        assert all(torch.equal(one[number][key], other[number][key]) for number in one for key in one[number])


def test_other_settings_are_not_resumed(tmp_path):
    strategy = initialised(NADarts(distance=1, size=1), *resumable(tmp_path, Stop()))
    with pytest.raises(StoppedError):
        strategy.run()
    space, evaluator = resumable(tmp_path)
    evaluator.fit_kwargs["ckpt_path"] = str(tmp_path / "search.ckpt")
    other = initialised(NADarts(distance=2, size=1), space, evaluator)
    with pytest.raises(ValueError, match=r"search to resume has distance=1, this strategy distance=2: "):
        other.run()


def test_nnis_gumbel_darts_searches_our_spaces():
    torch.manual_seed(0)
    strategy = initialised(GumbelDARTS(), NasBench201Space(10, 4, 1), classification(8))
    strategy.run()
    (model,) = strategy.list_models()
    assert model.executable_model()(torch.randn(2, 3, 8, 8)).shape == (2, 10)


def test_a_mixture_is_searched_by_paths_afterwards():
    """What NADarts has trained, GeNAS fixes paths of."""
    torch.manual_seed(0)
    strategy = initialised(NADarts(), NasBench201Space(10, 4, 1), classification(8))
    space, images = strategy.supernet.eval(), torch.randn(2, 3, 8, 8)
    paths = SupernetPaths(GeNAS().mutate_model(space))
    candidate = paths.search_space.sample(np.random.default_rng(0))
    with torch.no_grad():
        mixture = space(images)
        paths.fix(candidate)
        torch.testing.assert_close(space(images), space.subnet(candidate)(images))
        strategy.oneshot_module.set_model(space)
        strategy.oneshot_module.resample()
        torch.testing.assert_close(space(images), mixture)


def test_moves_are_all_combinations_once():
    moves = Moves([3, 2, 4], 2)
    every = [row for row in itertools.product(range(3), range(2), range(4)) if sum(move > 0 for move in row) <= 2]
    assert sorted(map(moves.of, range(moves.count + 1))) == sorted(every)
    assert moves.of(0) == (0, 0, 0)


def test_samples_are_uniform_and_without_repetition():
    moves = Moves([3, 2, 4], 2)
    rng = np.random.default_rng(0)
    draws = [moves.sample(3, rng) for _ in range(3_000)]
    assert all(len(set(draw)) == 3 for draw in draws)
    counts = Counter(number for draw in draws for number in draw)
    assert sorted(counts) == list(range(1, moves.count + 1))
    assert chisquare(list(counts.values())).pvalue > 1e-3
    # Far more than a 64-bit integer can count.
    assert len(set(Moves([8] * 28, 28).sample(5, rng))) == 5


def test_equal_losses_have_equal_shares():
    for aggregate in ("mean", "mean-std"):
        torch.testing.assert_close(aggregate_gradient(torch.full((4,), 2.0), aggregate), torch.full((4,), 0.25))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distance": -1}, "distance must not be negative, got -1"),
        ({"distance": 1.5}, "distance must be a whole number, got 1.5"),
        ({"size": -1}, "size must not be negative, got -1"),
        ({"aggregate": "max"}, "Unknown aggregate 'max'; valid aggregates: mean, median, min, mean-std"),
        ({"ascent": "up"}, "Unknown ascent 'up'; valid ascents: a2m, sam"),
        ({"rho": -0.1}, "rho must be at least 0, got -0.1"),
        ({"rho": float("nan")}, "rho must be at least 0, got nan"),
        ({"include_self": "no"}, "include_self must be true or false, got 'no'"),
        ({"distance": 0, "include_self": False}, "include_self must be true where there are no neighbours"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"arc_learning_rate": 0}, "arc_learning_rate must be larger than 0, got 0"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        NADarts(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distance": 7}, r"distance must be at most 6, the choices of NasBench201Space, got 7\."),
        (
            {"size": 25},
            r"size must be at most 24, the neighbours within distance 1 in NasBench201Space, or None for all",
        ),
    ],
)
def test_what_is_beyond_the_space_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        initialised(NADarts(**settings), NasBench201Space(10, 4, 1), classification())


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"gradient_clip_val": 5.0}, r"gradient_clip_val=5\.0.* pass gradient_clip_val=5\.0 to NADarts\."),
        ({"accumulate_grad_batches": 2}, r"accumulate_grad_batches=2.* use larger batches\."),
    ],
)
def test_trainers_that_one_optimizer_needs_are_refused(trainer, message):
    with pytest.raises(ValueError, match=message):
        initialised(NADarts(), NasBench201Space(10, 4, 1), classification(**trainer))


def test_a_supernet_that_cannot_be_mixed_is_refused():
    space = NasBench201Space(10, 4, 1)
    space.network.supernet = Unmixable()
    with pytest.raises(TypeError, match=r"Unmixable has no relaxation, .*Search it with GeNAS"):
        initialised(NADarts(), space, classification())


class Unmixable(nn.Module):
    search_space = NasBench201SearchSpace()
