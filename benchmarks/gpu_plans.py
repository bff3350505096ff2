"""What ``benchmarks/gpu.py`` measures: the steps of its plans, in the order of their worth."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PLANS", "Plan", "Step"]

_SEARCH = ("nni", "pytorch_lightning")


@dataclass(frozen=True)
class Step:
    """One measurement.

    Attributes:
        name: Of its files.
        shows: What it measures, and the target where there is one.
        share: Of the plan's time, in seconds.
        command: Without the interpreter. ``{device}``, ``{accelerator}`` (``gpu`` or ``cpu``), ``{output}`` (the
            plan's folder), ``{source}`` (the kit's data) and ``{seconds}`` (there are) are filled in.
        rehearsal: What a rehearsal adds to the command; options that are given again count.
        needs: Modules without which it cannot run.
        resumes: Goes on where it was cut off.
        after: A step without which it cannot run.
        writes: A folder in the plan's own; begun anew with a step that does not go on.
    """

    name: str
    shows: str
    share: float
    command: str
    rehearsal: str = ""
    needs: tuple[str, ...] = ()
    resumes: bool = False
    after: str = ""
    writes: str = ""


@dataclass(frozen=True)
class Plan:
    """Steps of one call.

    Attributes:
        minutes: That they take at most, all together.
        steps: In the order of their worth.
        data: Files of the kit's data that they read.
        tables: A file in the plan's folder that the report takes up.
        networks: Pattern of trained networks in the plan's folder.
    """

    minutes: float
    steps: tuple[Step, ...]
    data: tuple[str, ...] = ()
    tables: str = ""
    networks: str = ""


_SMALL = "--init-channels 4 --num-cells 3 --image-size 16"
_SMALL_SCORES = f"{_SMALL} --candidates 1 --images 64 --recalibration-images 64"

SPEED = Plan(
    4,
    (
        Step(
            "tests",
            "the tests that need a GPU",
            30,
            "-m pytest -q -p no:cacheprovider -m gpu tests/core tests/nni tests/timm",
            needs=("pytest", *_SEARCH, "timm"),
        ),
        Step(
            "scoring_cifar10",
            "a candidate at the sigmas of CIFAR-10: ours / bare <= 1.15, naive / ours >= 20; several in flight",
            35,
            "benchmarks/scoring.py --device {device} --sigmas 1e-5 5e-5 1e-4 --candidates 3 --in-flight 2 4 --check",
            _SMALL_SCORES,
        ),
        Step(
            "training",
            "training steps, plain loop / ours >= 3",
            30,
            "benchmarks/training.py --device {device} --steps 60 --check",
            f"{_SMALL} --steps 3 --batch-size 8",
            needs=_SEARCH,
        ),
        Step(
            "roofline",
            "25,000 images and a training step, ours / floor <= 5; a search of the paper's size in 60 minutes",
            30,
            "benchmarks/roofline.py --device {device} --images 25000 --rounds 1",
            f"{_SMALL} --images 64 --recalibration-images 64 --steps 2",
            needs=_SEARCH,
        ),
        Step(
            "scoring_cifar100",
            "the same as for CIFAR-10 at the sigmas of CIFAR-100",
            20,
            "benchmarks/scoring.py --device {device} --sigmas 1e-3 3e-3 6e-3 --candidates 2 --check",
            _SMALL_SCORES,
        ),
        Step(
            "scoring_contiguous",
            "the same at batches that are not channels-last, which depthwise convolutions may like better",
            12,
            "benchmarks/scoring.py --device {device} --candidates 2 --contiguous",
            _SMALL_SCORES,
        ),
        Step(
            "search",
            "a supernet of digits, for the next step",
            20,
            "-m genas_plugins search --quiet --output {output}/digits --config quickstart_digits --train-only "
            "--set training.epochs=8 --set training.accelerator={accelerator}",
            "--set training.epochs=1 --set data.train_images=64 --set data.validation_images=64 "
            "--set score.recalibration_images=64 --set space.init_channels=4",
            needs=_SEARCH,
            writes="digits",
        ),
        Step(
            "agreement",
            "50 candidates against float64 at sigmas from 1e-5: tau >= 0.99, losses within 1e-5",
            20,
            "benchmarks/agreement.py {output}/digits --device {device} --candidates 50 --images 256 "
            "--sigmas 1e-5 5e-5 1e-4 --check",
            "--candidates 4 --images 16",
            needs=_SEARCH,
            after="search",
        ),
        Step(
            "networks",
            "the timm models at batch 128 in bfloat16, channels last: ours / plain >= 0.97",
            25,
            "benchmarks/networks.py --device {device} --batch-size 128 --amp bfloat16 --channels-last --rounds 3 "
            "--models --check",
            "--batch-size 1 --image-size 64 --rounds 1 --warmup 1",
            needs=("timm",),
        ),
        Step(
            "mmseg",
            "DeepLab-v3 on 2 crops of 512x1024, beside ResNet-50",
            20,
            "benchmarks/dense.py mmseg --device {device} --rounds 3",
            "--crop 64 64 --rounds 1 --warmup 1",
            needs=("mmseg",),
        ),
        Step(
            "detectron2",
            "RetinaNet on 2 images of 800x1088, beside ResNet-50",
            20,
            "benchmarks/dense.py detectron2 --device {device} --rounds 3",
            "--crop 64 64 --rounds 1 --warmup 1",
            needs=("detectron2",),
        ),
    ),
)

_EVIDENCE = "{output} --source {source} --device {device} --seconds {seconds}"
EVIDENCE = Plan(
    9,
    (
        Step(
            "train",
            "NAS-Bench-201 supernets at the paper's size, three seeds at once; 250 epochs if they fit",
            335,
            f"benchmarks/evidence.py train {_EVIDENCE}",
            "--rehearse --seeds 0 1",
            needs=(*_SEARCH, "PIL"),
            resumes=True,
        ),
        Step(
            "score",
            "random architectures under all settings of the paper's tables on 5,000 images, as many as fit",
            175,
            f"benchmarks/evidence.py score {_EVIDENCE}",
            "--rehearse --seeds 0 1",
            needs=(*_SEARCH, "PIL", "matplotlib"),
            resumes=True,
            after="train",
        ),
        Step(
            "tables",
            "Tables 1, 5, 6 and 7 beside the paper's, with intervals",
            30,
            f"benchmarks/evidence.py tables {_EVIDENCE}",
            "--seeds 0 1 --resamples 50",
            needs=(*_SEARCH, "matplotlib"),
            after="train",
        ),
    ),
    data=("cifar10_train.zip", "cifar10_test.zip", "nasbench201_accuracy.csv"),
    tables="tables.md",
    networks="seed*.safetensors",
)

PLANS: dict[str, Plan] = {"speed": SPEED, "evidence": EVIDENCE}
