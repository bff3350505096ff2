"""Experiments as files: what a YAML experiment may say, and one clear sentence where it says something else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field

from genas_plugins._messages import one_line, shown
from genas_plugins._reading import ReadingError, parse_yaml
from genas_plugins._settings import Dotless, Listed, Real, Reals, checked, find_file, read_file, settings
from genas_plugins.checks import MOST, MOST_IMAGES, MOST_SEED
from genas_plugins.darts.network import MAX_CELLS, MAX_CHANNELS, MAX_CLASSES
from genas_plugins.experiment.costs import COSTS, Counted
from genas_plugins.experiment.neighbours import NO_RACE
from genas_plugins.experiment.sections import ConfigError, Data, Space, Training
from genas_plugins.files import packaged_configs
from genas_plugins.scoring import METRICS, CombinedScore, NeighbourhoodScore, Recalibration
from genas_plugins.scoring.neighbourhood import AGGREGATES
from genas_plugins.search import Evolution, InFlight
from genas_plugins.search.budget import Limits, amount
from genas_plugins.search.pareto import check_objectives, evolution_for
from genas_plugins.search.racing import check_confidence
from genas_plugins.spaces import find_space

__all__ = [
    *("ConfigError", "Experiment", "Measured"),
    *("config_names", "dump", "find_config", "load", "parse", "plain"),
]

_Count = Annotated[int, Field(ge=1, le=MOST)]
_Cells = Annotated[int, Field(ge=1, le=MAX_CELLS)]
_Pixels = Annotated[int, Field(ge=1, le=16_384)]
_Processes = Annotated[int, Field(ge=1, le=1_024)]
_Rate = Annotated[float, Field(gt=0, le=1e3), Dotless]


@settings(ConfigError)
class Measured(CombinedScore):
    """A score as files write it."""

    metric: Literal[METRICS] = CombinedScore.metric
    sigmas: Reals = CombinedScore.sigmas
    alpha: Real = CombinedScore.alpha
    gamma: Real = CombinedScore.gamma
    gamma_accuracy: Real = CombinedScore.gamma_accuracy
    recalibration_momentum: Real | None = None

    def build(self) -> CombinedScore:
        """The settings as the score that measures."""
        return CombinedScore(**{item.name: getattr(self, item.name) for item in dataclasses.fields(CombinedScore)})


@settings(ConfigError)
class Neighbourhood:
    """How the scores of an architecture and of its neighbours are put together.

    See :class:`genas_plugins.scoring.NeighbourhoodScore`.

    Attributes:
        aggregate: What is made of the scores; ``mean-std`` is the mean less the standard deviation.
        distance: Edits away that a neighbour is at most.
        size: A seeded sample of so many neighbours; ``null`` takes all.
        include_self: Whether the architecture counts as one of its neighbourhood.
        inputs: Whether neighbours may have inputs moved too.
    """

    aggregate: Literal[AGGREGATES] = "mean"
    distance: Annotated[int, Field(ge=1, le=64)] = 1
    size: Annotated[int, Field(ge=0, le=10**6)] | None = None
    include_self: bool = True
    inputs: bool = False

    def __post_init__(self) -> None:
        self.build(CombinedScore())

    def build(self, score: CombinedScore) -> NeighbourhoodScore:
        """The settings as the score of a neighbourhood over one of single architectures."""
        return NeighbourhoodScore(score, **dataclasses.asdict(self))


@settings(ConfigError)
class Score(Measured):
    """The metric; see :class:`genas_plugins.scoring.CombinedScore`.

    Attributes:
        neighbourhood: With it an architecture's score is put together from its own and those of its neighbours.
        recalibration_images: Training images for the statistics of batch normalisation; ``null`` is 850, or all of the
            train half if it has fewer, and 0 keeps the supernet's.
        recalibration_batch_size: Images of a batch of them.
        batch_size: Validation images of a pass; ``null`` is 64 on a CPU and 2,048 on a GPU, halved where memory lacks.
    """

    neighbourhood: Neighbourhood | None = None
    recalibration_images: Annotated[int, Field(ge=0, le=MOST_IMAGES)] | None = None
    recalibration_batch_size: Annotated[int, Field(ge=2, le=MOST)] = 64
    batch_size: _Count | None = None

    @property
    def searched(self) -> CombinedScore | NeighbourhoodScore:
        """What a search goes by."""
        score = self.build()
        return score if self.neighbourhood is None else self.neighbourhood.build(score)

    @property
    def recalibration(self) -> Recalibration:
        """What the statistics of batch normalisation are recomputed from."""
        count = {} if self.recalibration_images is None else {"images": self.recalibration_images}
        return Recalibration(**count, batch_size=self.recalibration_batch_size, momentum=self.recalibration_momentum)


def _limit(value: Any) -> Any:
    """A limit as a section, in which way it ever is written."""
    if value is None or isinstance(value, str | int | float):
        return {} if value is None else {"max": amount(value)}
    return value


def _or_amount(schema: dict[str, Any]) -> None:
    schema["anyOf"] = [{"$ref": schema.pop("$ref")}, *({"type": kind} for kind in ("number", "string", "null"))]


_Amount = Annotated[float | None, BeforeValidator(lambda value: None if value is None else amount(value))]


@settings(ConfigError)
class Limit(Limits):
    """From where to where a cost may be, both ends included; an amount alone is the most.

    Attributes:
        min: The least; ``null`` for any.
        max: The most; ``null`` for any.
    """

    min: _Amount = None
    max: _Amount = None


_Limit = Annotated[Limit, BeforeValidator(_limit), Field(json_schema_extra=_or_amount)]


@settings(ConfigError)
class Constraints:
    """The budget of a search: what it proposes is within these limits.

    Attributes:
        params: Parameters, as a number or like ``4M``.
        macs: Multiply-adds of one image, as a number or like ``600M``.
        latency: Milliseconds on the device of the search.
    """

    params: _Limit = dataclasses.field(default_factory=Limit)
    macs: _Limit = dataclasses.field(default_factory=Limit)
    latency: _Limit = dataclasses.field(default_factory=Limit)


@settings(ConfigError)
class CountedNetwork(Counted):
    """Which network costs are those of; see :class:`genas_plugins.experiment.costs.Counted`."""

    init_channels: Annotated[int, Field(ge=1, le=MAX_CHANNELS)] | None = None
    num_cells: _Cells | None = None
    cells_per_stage: _Cells | None = None
    num_classes: Annotated[int, Field(ge=1, le=MAX_CLASSES)] | None = None
    image_size: _Pixels | None = None
    latency_batch: _Count = 1


@settings(ConfigError)
class Search:
    """The evolution; see :class:`genas_plugins.search.Evolution`.

    Attributes:
        population: Candidates a generation.
        generations: Generations, the random first one included.
        parents: The best so far that mutate and cross; ``null`` is 10, or the population where there are objectives.
        mutants: Mutants a generation; ``null`` is half of the population, the paper's 25 of 50.
        crossovers: Crossovers a generation; ``null`` is half of the population.
        mutation_probability: Probability that an edge is drawn anew.
        evaluations: In place of ``generations``, the measurements that the search may take, neighbours' included.
        racing: A confidence such as 0.999, with which candidates that cannot be parents are not measured on all images
            (:mod:`genas_plugins.search.racing`); ``null`` measures them on all.
        in_flight: Candidates that each device measures at a time; ``null`` is as many as PyTorch has threads on a CPU,
            with one thread each, and 1 on a GPU.
        constraints: The budget: what the network that ``counted`` says may cost.
        objectives: Two or more of ``score``, ``flatness``, ``angle``, ``accuracy``, ``params``, ``macs``, ``latency``
            for a front (:class:`genas_plugins.search.ParetoEvolution`); empty goes by the score alone.
        counted: Which network the costs are those of.
        service: ``null`` measures here; ``local`` has NNI's engine spread the candidates over ``workers`` processes of
            this machine, one on each GPU where there are any; another service is that of an experiment file of NNI,
            whose path it is (``docs/cluster.md``).
        workers: Processes of the service.
    """

    population: int = 50
    generations: int = 20
    parents: int | None = None
    mutants: int | None = None
    crossovers: int | None = None
    mutation_probability: Real = 0.1
    evaluations: _Count | None = None
    racing: Real | None = None
    in_flight: int | None = None
    service: str | None = None
    workers: _Processes = 1
    constraints: Constraints = dataclasses.field(default_factory=Constraints)
    objectives: Annotated[tuple[str, ...], Listed] = ()
    counted: CountedNetwork = dataclasses.field(default_factory=CountedNetwork)

    def __post_init__(self) -> None:
        InFlight(self.in_flight)
        if self.racing is not None:
            check_confidence(self.racing)
            if self.service is not None:
                raise ValueError(
                    "racing compares candidates slice by slice of the images, which the workers of a service cannot: "
                    f"set racing or service to null, got {self.racing:g} and {shown(self.service)}."
                )
        if self.service not in (None, "local") and Path(str(self.service)).suffix not in (".yaml", ".yml"):
            raise ValueError(
                f"service must be local, or a YAML file of an experiment of NNI, got {shown(self.service)}."
            )
        built = self.evolution()
        # As numbers, which is what a run is stored and compared with.
        for name in ("parents", "mutants", "crossovers"):
            object.__setattr__(self, name, getattr(built, name))

    def evolution(self, **more: Any) -> Evolution[Any]:
        """The evolution of these settings, with a space that takes its place later, and more of its keywords."""
        names = ("population", "generations", "parents", "mutants", "crossovers", "mutation_probability", "evaluations")
        return evolution_for(self.objectives, self.racing, **{name: getattr(self, name) for name in names}, **more)


@settings(ConfigError)
class Experiment:
    """One search: data, supernet, training, score and evolution, under one seed.

    Attributes:
        seed: Of everything: initial weights, split, paths, noise, evolution.
        deterministic: Ask PyTorch for deterministic kernels. On a CPU they are, with one number of threads; on a GPU
            two trainings from one seed otherwise agree up to rounding that grows from step to step.
        space: The supernet.
        data: The images.
        training: How the supernet is trained.
        score: What architectures are compared by.
        search: The evolution.
    """

    seed: Annotated[int, Field(ge=0, le=MOST_SEED)] = 0
    deterministic: bool = False
    space: Space = dataclasses.field(default_factory=Space)
    data: Data = dataclasses.field(default_factory=Data)
    training: Training = dataclasses.field(default_factory=Training)
    score: Score = dataclasses.field(default_factory=Score)
    search: Search = dataclasses.field(default_factory=Search)

    def __post_init__(self) -> None:
        if self.search.objectives:
            check_objectives(self.search.objectives, self.score.metrics, COSTS)
        if self.score.neighbourhood is not None and self.search.racing is not None:
            raise ValueError(NO_RACE)
        space = find_space(self.space.name)
        if self.search.service is not None and self.score.neighbourhood:
            raise ValueError(
                "score.neighbourhood measures what candidates have in common once, which the workers of a service "
                "cannot: set it, or search.service, to null."
            )
        self.search.counted.arguments(space, space.supernet_arguments(1, self.space), 32)


def config_names() -> dict[str, Path]:
    """The experiments that come with the package, by name."""
    return packaged_configs("nni")


def find_config(name_or_path: str | Path) -> Path:
    """A YAML file by its path, or one that comes with the package by its name.

    Raises:
        ConfigError: There is neither.
    """
    return find_file(name_or_path, "nni", "experiment file", ConfigError)


def load(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment, with ``section.key=value`` overrides on top.

    Raises:
        ConfigError: See :func:`parse`; the message names the file.
    """
    path = find_config(name_or_path)
    data = read_file(path, ConfigError, dict)
    for override in overrides:
        _apply(data, override)
    try:
        return parse(data)
    except ConfigError as error:
        raise ConfigError(f"{path.name}: {error}") from None


def parse(data: Mapping[str, Any]) -> Experiment:
    """Validate plain data as an experiment.

    Raises:
        ConfigError: An unknown key, a wrong type, a value out of its range. One sentence, with the valid choices.
    """
    return checked(Experiment, data, ConfigError, "the experiment")


def dump(experiment: Experiment) -> str:
    """The experiment as YAML, every setting spelled out."""
    return yaml.safe_dump(plain(experiment), sort_keys=False)


def plain(experiment: Experiment) -> dict[str, Any]:
    """The experiment as data for YAML or JSON, every setting spelled out."""
    return json.loads(json.dumps(dataclasses.asdict(experiment)))


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set takes section.key=value, for instance search.generations=5; got {shown(override)}.")
    try:
        value = parse_yaml(text)
    except ReadingError as error:
        raise ConfigError(f"--set {shown(override)}: the value is not YAML: {error}.") from error
    *sections, last = key.split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise ConfigError(f"--set {shown(override)}: {one_line(section, 100)} is not a section.")
    data[last] = value
