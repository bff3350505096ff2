"""The benchmark of networks: what it compares agrees, what it prints is what it measured; the speeds are not tested."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from genas_plugins import Genotype
from genas_plugins.counting import count_macs
from genas_plugins.darts.zoo import ZOO

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--device", "cpu", "--image-size", "32", "--batch-size", "4", "--warmup", "1"]
OURS = "genas_flatness_c100"
# Between them the seven operations, and each of them with stride 2.
EVERY_OPERATION = Genotype(
    [
        *(("max_pool_3x3", 0), ("avg_pool_3x3", 1), ("skip_connect", 0), ("sep_conv_3x3", 2)),
        *(("sep_conv_5x5", 1), ("dil_conv_3x3", 3), ("dil_conv_5x5", 0), ("avg_pool_3x3", 4)),
    ],
    [
        *(("max_pool_3x3", 0), ("avg_pool_3x3", 1), ("skip_connect", 0), ("sep_conv_3x3", 1)),
        *(("sep_conv_5x5", 0), ("dil_conv_3x3", 1), ("dil_conv_5x5", 0), ("skip_connect", 3)),
    ],
)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The benchmark, imported as Python does when it runs it: from a path that holds its folder."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    # main() switches it on for CUDA.
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    yield importlib.import_module("networks")
    for name in ("networks", "scoring"):
        sys.modules.pop(name, None)


@pytest.fixture
def tiny(networks: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark with small networks for ours and for the plain one."""
    monkeypatch.setitem(networks.BUILDERS, OURS, lambda: ours(networks, ZOO[OURS].genotype, 3))
    monkeypatch.setitem(networks.BUILDERS, "plain", lambda: networks.PlainNetwork(ZOO[OURS].genotype, 4, 3))
    return networks


def ours(networks: Any, genotype: Genotype, cells: int) -> torch.nn.Module:
    return networks.timm.create_model("genas_cell", genotype=genotype, init_channels=4, num_cells=cells, auxiliary=True)


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(ROOT / "benchmarks" / "networks.py"), *TINY, "--threads", "1", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)


@pytest.mark.parametrize(("genotype", "cells", "size"), [(EVERY_OPERATION, 3, 64), (ZOO[OURS].genotype, 5, 96)])
def test_ours_agrees_with_the_plain_network(networks: Any, genotype: Genotype, cells: int, size: int) -> None:
    torch.manual_seed(0)
    networks.check_agreement(ours(networks, genotype, cells), networks.PlainNetwork(genotype, 4, cells), size)


@pytest.mark.parametrize(
    ("edge", "other"),
    # Another input, a pooling of another kind, a skip for a pooling: all have the weights of the first.
    [(3, ("sep_conv_3x3", 1)), (0, ("avg_pool_3x3", 0)), (1, ("skip_connect", 1))],
)
def test_networks_that_differ_in_one_edge_do_not_agree(networks: Any, edge: int, other: tuple[str, int]) -> None:
    normal = list(EVERY_OPERATION.normal)
    normal[edge] = other
    torch.manual_seed(0)
    plain = networks.PlainNetwork(Genotype(normal, EVERY_OPERATION.reduce), 4, 3)
    with pytest.raises(AssertionError, match="not close"):
        networks.check_agreement(ours(networks, EVERY_OPERATION, 3), plain, 64)


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        # The paper; Howard et al. 2019 (5.4 M, 219 M); Radosavovic et al. 2020 (6.1 M, 0.6 G); NASNet-A (4 @ 1056)
        # has 5.3 M and 564 M (Zoph et al. 2018), to which 6 @ 864 comes near.
        (OURS, 5.2, 579),
        ("plain", 5.2, 579),
        ("mobilenetv3_large_100", 5.4, 219),
        ("regnety_006", 6.1, 600),
        ("nasneta_6_864", 5.3, 564),
    ],
)
def test_the_networks_have_the_published_sizes(networks: Any, name: str, parameters: float, macs: float) -> None:
    with torch.device("meta"):
        model = networks.build(name)
    without_head = sum(p.numel() for key, p in model.named_parameters() if not key.startswith("auxiliary"))
    tolerance = 0.06 if name == "nasneta_6_864" else 0.02
    assert without_head / 1e6 == pytest.approx(parameters, rel=tolerance)
    assert count_macs(model) / 1e6 == pytest.approx(macs, rel=tolerance)


@pytest.mark.parametrize("name", [OURS, "plain"])
def test_a_training_step_is_sgd_on_the_loss_with_the_auxiliary_head(tiny: Any, name: str) -> None:
    arm = tiny.Arm(tiny.build(name), tiny.parse([*TINY, "--image-size", "64"]))
    model = copy.deepcopy(arm.model).train()
    logits, auxiliary = model(arm.images)
    (F.cross_entropy(logits, arm.labels) + 0.4 * F.cross_entropy(auxiliary, arm.labels)).backward()
    arm.seconds("training", 1)
    for before, after in zip(model.parameters(), arm.model.parameters(), strict=True):
        torch.testing.assert_close(after, before - 1e-3 * before.grad)
        assert after.grad is None


def test_inference_runs_every_step_and_changes_nothing(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.5])
    monkeypatch.setitem(tiny.CLOCKS, "wall", lambda: next(clock))
    arm = tiny.Arm(tiny.build(OURS), tiny.parse(TINY))
    before = copy.deepcopy(arm.model.state_dict())
    calls: list[tuple[bool, bool]] = []
    arm.model.register_forward_hook(
        lambda module, *_: calls.append((module.training, torch.is_inference_mode_enabled()))
    )
    assert arm.seconds("inference", 3) == 2.5
    assert calls == [(False, True)] * 3
    assert all(torch.equal(before[key], value) for key, value in arm.model.state_dict().items())


# Seconds of the three rounds: ours in training, plain in training, ours in inference, plain in inference.
SECONDS = {
    "faster": ([2.0, 1.0, 4.0], [4.0, 4.0, 4.0], [1.0, 1.0, 1.0], [1.0, 1.25, 1.0]),
    "within the noise": ([1.0, 1.0, 1.0], [0.98, 0.98, 0.5], [1.0, 1.0, 1.0], [1.0, 1.0, 0.98]),
    "slower in training": ([1.0, 1.0, 1.0], [0.96, 0.96, 2.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]),
    "slower in inference": ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.96, 0.96, 2.0]),
}


@pytest.mark.parametrize(
    ("case", "training", "inference"),
    # Ours / plain in speed is plain / ours in time: median, least, most.
    [
        ("faster", "2.000 (1.000 - 4.000)", "1.000 (1.000 - 1.250)"),
        ("within the noise", "0.980 (0.500 - 0.980)", "1.000 (0.980 - 1.000)"),
        ("slower in training", "0.960 (0.960 - 2.000)", "1.000 (1.000 - 1.000)"),
        ("slower in inference", "1.000 (1.000 - 1.000)", "0.960 (0.960 - 2.000)"),
    ],
)
def test_turns_tables_and_check(
    tiny: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    case: str,
    training: str,
    inference: str,
) -> None:
    keys = [(name, mode) for mode in ("training", "inference") for name in ("GenasNet", "PlainNetwork")]
    seconds = dict(zip(keys, SECONDS[case], strict=True))
    left = {key: iter(values) for key, values in seconds.items()}
    turns: list[tuple[str, str]] = []

    def fake(arm: Any, mode: str, steps: int) -> float:
        if steps != 5:
            return 0.0  # The warm-up.
        turns.append((type(arm.model).__name__, mode))
        return next(left[turns[-1]])

    monkeypatch.setattr(tiny.Arm, "seconds", fake)
    output = tmp_path / "figures.json"
    arguments = [*TINY, "--models", "--rounds", "3", "--steps", "5", "--output", str(output)]
    assert tiny.main([*arguments, "--check"]) == (1 if case.startswith("slower") else 0)
    back = [keys[1], keys[0], keys[3], keys[2]]
    assert turns == [*keys, *back, *keys]

    figures = json.loads(output.read_text())
    assert figures["torch"] == torch.__version__ and figures["settings"]["rounds"] == 3
    for name, key in ((OURS, "GenasNet"), ("plain", "PlainNetwork")):
        for mode in ("training", "inference"):
            # Five steps of four images.
            expected = [20 / value for value in seconds[key, mode]]
            assert figures["models"][name]["images_per_second"][mode] == pytest.approx(expected)
    text = capsys.readouterr().out
    ratios = re.search(r"^ours / plain +(\S+ \(.*?\)) +(\S+ \(.*?\)) +>= 0\.97$", text, re.MULTILINE)
    assert ratios is not None and ratios.groups() == (training, inference)
    if case == "faster":
        # Speeds of 10, 20 and 5 images a second, and of 20.
        assert re.search(rf"^{OURS} .* 10\.0 \(5\.0 - 20\.0\) +20\.0 \(20\.0 - 20\.0\) +- / -$", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--image-size", "100"], "--image-size must be a multiple of 32, got 100"),
        (["--memory", "--compile"], "leave out --compile"),
        (["--models", "resnet50"], "invalid choice: 'resnet50'"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    networks: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        networks.main(["--device", "cpu", *arguments])
    assert stopped.value.code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--amp", "bfloat16"], ["--amp", "float16", "--channels-last"]])
def test_mixed_precision_trains_and_infers(tiny: Any, options: list[str]) -> None:
    arm = tiny.Arm(tiny.build(OURS), tiny.parse([*TINY, *options]))
    seen: list[torch.dtype] = []
    arm.model.cells[2].preprocess1.op[1].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    for mode in ("inference", "training"):
        assert arm.seconds(mode, 1) > 0.0
    assert seen == [getattr(torch, options[1])] * 2
    assert all(bool(p.isfinite().all()) for p in arm.model.parameters())
    assert arm.images.is_contiguous(memory_format=torch.channels_last) is ("--channels-last" in options)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_a_fresh_process_holds_weights_gradients_and_momentum() -> None:
    done = run_script("--memory-of", OURS, "training")
    assert done.returncode == 0, done.stderr
    # The auxiliary head on 4 * 184 channels: 1x1 to 128, batch norm, 2x2 to 768, classifier.
    parameters = ZOO[OURS].params + 736 * 128 + 2 * 128 + 128 * 768 * 4 + 768 * 1000 + 1000
    least = 3 * 4 * parameters / 1e6
    assert least < float(done.stdout) < least + 200


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_whole_script(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    done = run_script("--rounds", "2", "--memory", "--output", str(output))
    assert done.returncode == 0, done.stderr
    models = json.loads(output.read_text())["models"]
    assert list(models) == [OURS, "plain", "mobilenetv3_large_100", "regnety_006", "nasneta_6_864"]
    for name, figures in models.items():
        assert re.search(rf"^{name}( .*){{6}}$", done.stdout, re.MULTILINE)
        # Training has gradients and momentum beside the weights.
        weights = 4 * figures["parameters"] / 1e6
        memory = figures["memory_mb"]
        assert memory["training"] > 3 * weights and memory["training"] > memory["inference"] > weights
        assert all(len(speeds) == 2 and min(speeds) > 0 for speeds in figures["images_per_second"].values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_peak_memory_on_cuda_is_of_tensors(tiny: Any) -> None:
    args = tiny.parse(["--device", "cuda", "--image-size", "64", "--batch-size", "8", "--steps", "1", "--warmup", "1"])
    tiny.prepare("small", tiny.MODES, args)
    arm, peaks = tiny.prepare(OURS, tiny.MODES, args)
    weights = 4 * sum(p.numel() for p in arm.model.parameters()) / 1e6
    images = 8 * 3 * 64 * 64 * 4 / 1e6
    assert peaks["inference"] > weights + images
    assert peaks["training"] > 3 * weights + images
