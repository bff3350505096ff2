"""The same logits after what users do to a network: scripting, tracing, export, compiling, precision, placement."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.layers import create_feature_extractor
from torch import Tensor, nn

# What deprecates the TorchScript functions is PyTorch; timm and many users still call them.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")

# Neighbouring kernels add in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def assert_close(actual: Tensor | tuple[Tensor, ...], expected: Tensor | tuple[Tensor, ...]) -> None:
    assert type(actual) is type(expected)
    torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.fixture
def network(small, randomize):
    """A network in evaluation mode, or in training mode with its auxiliary head."""

    def build(mode: str = "plain", **changes: object) -> nn.Module:
        model = randomize(small(auxiliary=mode != "plain", **changes))
        return model.train(mode == "auxiliary, training")

    return build


MODES = ["plain", "auxiliary", "auxiliary, training"]


@pytest.fixture
def logits(images):
    """Images and what a copy of the network makes of them, whose statistics training must not change."""

    def of(model: nn.Module, *size: int) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
        x = images(2, 3, *(size or (64, 64)))
        with torch.no_grad():
            return x, copy.deepcopy(model)(x)

    return of


@pytest.mark.parametrize("mode", MODES)
def test_channels_last(network, logits, mode):
    model = network(mode)
    x, expected = logits(model)
    out = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert_close(out, expected)


@pytest.mark.parametrize(("mode", "output_stride"), [*((mode, 32) for mode in MODES), ("plain", 8)])
def test_script(network, logits, mode, output_stride):
    model = network(mode, output_stride=output_stride, num_cells=3)
    x, expected = logits(model)
    assert_close(torch.jit.script(model)(x), expected)


def test_a_scripted_network_takes_any_size_and_a_wrapper(network, logits):
    model = network(num_cells=3)
    scripted = torch.jit.script(nn.Sequential(model, nn.Softmax(1)))
    for size in ((64, 64), (33, 50)):
        x, expected = logits(model, *size)
        assert_close(scripted(x), expected.softmax(1))


def test_trace(network, logits):
    model = network(num_cells=3)
    x, expected = logits(model)
    assert_close(torch.jit.trace(model, x)(x), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("output_stride", [32, 8])
def test_symbolic_trace(network, logits, mode, output_stride):
    model = network(mode, output_stride=output_stride, num_cells=3)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    # Not one size: what is padded depends on it.
    for size in ((64, 64), (33, 50)):
        x, expected = logits(model, *size)
        assert_close(traced(x), expected)


# One input a node, skips of skips, and a reduction cell that does not read its second input.
THIN = (3, 0, 0, 0, 3, 0, 1, 0, 0, 0, 0, 0, 5, 0, 2, 0, 3, 0, 0, 0, 0, 7, 0, 0, 0, 0, 3, 0)
CHANGES = {
    "script": lambda model, x: torch.jit.script(model),
    "trace": torch.jit.trace,
    "fx": lambda model, x: torch.fx.symbolic_trace(model),
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
    "compile": lambda model, x: torch.compile(model, backend="eager", fullgraph=True),
    "channels last": lambda model, x: model.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("genotype", [THIN, "fairdarts_b_c10"], ids=["thin", "fairdarts"])
def test_nodes_of_one_input(network, logits, genotype, change):
    model = network(num_cells=3, genotype=genotype)
    x, expected = logits(model)
    assert_close(CHANGES[change](copy.deepcopy(model), x)(x), expected)


@pytest.mark.filterwarnings("ignore:The TorchScript type system doesn't support:UserWarning")
@pytest.mark.parametrize("mode", ["plain", "auxiliary"])
def test_a_traced_network_can_be_scripted(network, logits, mode):
    model = network(mode, num_cells=3)
    x, expected = logits(model)
    assert_close(torch.jit.script(torch.fx.symbolic_trace(model))(x), expected)


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing:UserWarning")
def test_torchvisions_feature_extractor(network, logits):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = network("auxiliary")
    x, expected = logits(model)
    _, features = model.forward_intermediates(x)
    nodes = {"stem0": "4", "cells.3": "16", "classifier": "logits"}
    for build in (extraction.create_feature_extractor, create_feature_extractor):
        out = build(model, nodes)(x)
        assert list(out) == ["4", "16", "logits"]
        assert_close([out["4"], out["16"]], [features[0], features[2]])
        assert_close(out["logits"], expected)


@pytest.mark.parametrize("mode", MODES)
def test_export(network, logits, mode):
    model = network(mode, num_cells=2)
    x, expected = logits(model)
    exported = torch.export.export(copy.deepcopy(model), (x,)).module()
    assert_close(exported(x), expected)


def test_export_for_any_batch_and_any_multiple_of_32(network, logits):
    model = network(num_cells=2, output_stride=16)
    x, _ = logits(model)
    rows, columns = (32 * torch.export.Dim(name, min=2, max=32) for name in ("rows", "columns"))
    shapes = ({0: torch.export.Dim("batch", min=1, max=64), 2: rows, 3: columns},)
    exported = torch.export.export(model, (x,), dynamic_shapes=shapes).module()
    for size in ((64, 64), (96, 160)):
        x, expected = logits(model, *size)
        assert_close(exported(x), expected)
        assert_close(exported(x[:1]), expected[:1])


@pytest.mark.parametrize("mode", ["plain", "auxiliary, training"])
def test_compile(network, logits, mode):
    # Sizes that other tests have compiled are remembered, and a size that changes takes ten times as long.
    torch.compiler.reset()
    model = network(mode, num_cells=2)
    x, expected = logits(model)
    # One graph: nothing in the network needs Python between two kernels. In training, of the gradients too.
    with torch.set_grad_enabled(model.training):
        assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "auxiliary, training"])
def test_compile_with_inductor(network, logits, mode):
    model = network(mode, num_cells=2)
    x, expected = logits(model)
    assert_close(torch.compile(model, fullgraph=True)(x), expected)


@pytest.mark.parametrize("auxiliary", [False, True])
def test_gradient_checkpointing(small, images, auxiliary):
    x = images(4, 3, 64, 64)
    # Dropped paths must be the same ones when the cells are computed again.
    plain, model = (small(auxiliary=auxiliary, drop_path_rate=0.3).train() for _ in range(2))
    model.set_grad_checkpointing()
    outputs, ran = [], []
    model.cells[1].register_forward_pre_hook(lambda module, args: ran.append(module))
    for network in (plain, model):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            out = network(x)
            out = torch.stack(out) if auxiliary else out
            out.square().sum().backward()
            outputs.append(out.detach())
    assert len(ran) == 2
    assert torch.equal(*outputs)
    for (name, parameter), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), name
    # Running statistics differ: computed again, a cell updates them again, as everywhere in PyTorch.
    model.set_grad_checkpointing(False)
    model(x)
    assert len(ran) == 3


def test_bfloat16_autocast(network, logits):
    model = network(init_channels=8)
    x, expected = logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        out = model(x)
    assert out.dtype == torch.bfloat16
    # Eight bits of mantissa, and some forty layers.
    assert (out - expected).norm() < 0.05 * (expected - expected.mean()).norm()


def test_from_the_meta_device(network, small, logits):
    model = network("auxiliary, training")
    x, expected = logits(model)
    state = model.state_dict()
    for assign in (False, True):
        other = small(auxiliary=True, device="meta")
        assert {tensor.device.type for tensor in other.state_dict().values()} == {"meta"}
        if not assign:
            other.to_empty(device="cpu")
        other.load_state_dict(state, assign=assign)
        assert {tensor.device.type for tensor in other.state_dict().values()} == {"cpu"}
        assert other.classifier.weight.requires_grad
        assert_close(copy.deepcopy(other)(x), expected)


def test_double_precision(network, small, logits):
    model = network("auxiliary, training")
    x, expected = logits(model)
    double = small(auxiliary=True, dtype=torch.float64)
    floats = [tensor for tensor in double.state_dict().values() if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in floats} == {torch.float64}
    double.load_state_dict(model.state_dict())
    out = double(x.double())
    assert {tensor.dtype for tensor in out} == {torch.float64}
    assert_close(tuple(tensor.float() for tensor in out), expected)
    # Only arguments, no global switch, decide.
    assert small().classifier.weight.dtype == torch.get_default_dtype() == torch.float32


def test_device_and_type_reach_every_layer():
    for output_stride in (32, 8):
        model = timm.create_model(
            "pcdarts_c100",
            auxiliary=True,
            output_stride=output_stride,
            norm_layer="layernorm2d",
            device="meta",
            dtype=torch.bfloat16,
        )
        assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
