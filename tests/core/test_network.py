"""Fixed networks: published parameter and multiply-add counts, shapes, auxiliary head, drop path."""

from __future__ import annotations

import re

import pytest
import torch

from genas_plugins import ZOO, CellNetwork, Genotype
from genas_plugins.counting import count_macs, count_parameters
from genas_plugins.darts.network import AuxiliaryHead, cell_shapes
from genas_plugins.darts.operations import Identity, drop_path

FLATNESS_C100 = Genotype.from_code([3, 5, 0, 4, 4, 0, 0, 4, 5, 0, 4, 0, 0, 7, 6, 3, 2, 0, 5, 0, 5, 0, 7, 0, 1, 1, 0, 0])
ANGLE_FLATNESS_C100 = Genotype.from_code(
    [3, 5, 1, 4, 0, 0, 4, 0, 4, 0, 4, 0, 0, 5, 6, 4, 0, 7, 2, 1, 3, 0, 0, 0, 4, 0, 0, 7]
)
FAIR = ZOO["fairdarts_b_c10"].genotype
# DARTS, second order (Liu et al., ICLR 2019): normal and reduction cell of its repository's DARTS_V2.
DARTS_V2 = Genotype(
    [("sep_conv_3x3", 0), ("sep_conv_3x3", 1)] * 2
    + [("sep_conv_3x3", 1), ("skip_connect", 0), ("skip_connect", 0), ("dil_conv_3x3", 2)],
    [("max_pool_3x3", 0), ("max_pool_3x3", 1), ("skip_connect", 2), ("max_pool_3x3", 1), ("max_pool_3x3", 0)]
    + [("skip_connect", 2)] * 2
    + [("max_pool_3x3", 1)],
)


@pytest.mark.parametrize(
    ("genotype", "channels", "parameters", "macs"),
    [
        # The paper prints 5.2 M and 579 M, 5.4 M and 602 M; DARTS prints 4.7 M.
        (FLATNESS_C100, 46, 5_195_205, 579.473),
        (ANGLE_FLATNESS_C100, 48, 5_413_696, 602.4),
        (DARTS_V2, 48, 4_718_752, None),
    ],
)
def test_published_counts_on_imagenet(genotype, channels, parameters, macs):
    with torch.device("meta"):
        network = CellNetwork(genotype, channels, 14, 1000)
    assert count_parameters(network) == parameters
    if macs is not None:
        assert count_macs(network) / 1e6 == pytest.approx(macs, abs=6e-4)


def test_published_count_on_cifar():
    # The DARTS repository prints "param size = 3.349342MB" for this network.
    with torch.device("meta"):
        assert count_parameters(CellNetwork(DARTS_V2, 36, 20, 10, stem="cifar")) == 3_349_342


@pytest.mark.parametrize("position", [0, 1])
def test_a_missing_edge_costs_nothing(position):
    # Node 2 of the normal cell is a skip connection of input 0 and a 5x5 separable convolution of input 1.
    with torch.device("meta"):
        whole = CellNetwork(FLATNESS_C100, 46, 14, 1000)
        pairs = list(FLATNESS_C100.normal)
        pairs[position] = ("none", pairs[position][1])
        network = CellNetwork(Genotype(pairs, FLATNESS_C100.reduce), 46, 14, 1000)
    # 4 normal cells each of 46, 92 and 184 channels, of 28, 14 and 7 pixels.
    sizes = [(46, 28), (92, 14), (184, 7)]
    kernels = sum(4 * 2 * (25 * c + c * c) for c, _ in sizes) * position
    scales = sum(4 * 2 * 2 * c for c, _ in sizes) * position
    macs = sum(4 * 2 * (25 * c + c * c) * pixels**2 for c, pixels in sizes) * position
    assert count_parameters(whole) - count_parameters(network) == kernels + scales
    assert count_macs(whole) - count_macs(network) == macs
    # What is left keeps its number.
    convolution = re.compile(r"cells\.(?!4\.|9\.)\d+\._ops\.1\.")
    left = {name for name in whole.state_dict() if not (position and convolution.match(name))}
    assert set(network.state_dict()) == left


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_a_node_of_one_input_is_that_operation(drop):
    network = CellNetwork(FAIR, 4, 3, 5, stem="cifar")
    network.drop_path_prob = drop
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def by_hand():
        s0, s1 = network.stem_states(x)
        for cell, gene in zip(network.cells, (FAIR.normal, FAIR.reduce, FAIR.reduce), strict=True):
            states = {0: cell.preprocess0(s0), 1: cell.preprocess1(s1)}
            for number, (name, source) in enumerate(gene):
                if name != "none":
                    out = cell._ops[number](states[source])
                    if drop and not isinstance(cell._ops[number], Identity):
                        out = drop_path(out, drop)
                    node = 2 + number // 2
                    states[node] = states[node] + out if node in states else out
            s0, s1 = s1, torch.cat([states[node] for node in (2, 3, 4, 5)], 1)
        return network.head(s1)

    results = []
    for forward in (by_hand, lambda: network(x)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            logits = forward()
        results.append((logits, *torch.autograd.grad(logits.square().sum(), list(network.parameters()))))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


@pytest.mark.parametrize(("stem", "size"), [("imagenet", 32), ("imagenet", 97), ("cifar", 32), ("cifar", 13)])
@pytest.mark.parametrize("cells", [2, 3, 5])
def test_any_image_size_gives_finite_logits_and_gradients(stem, size, cells):
    network = CellNetwork(FLATNESS_C100, 4, cells, 7, stem=stem)
    logits = network(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (2, 7) and bool(logits.isfinite().all())
    logits.square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize(
    ("stem", "cells", "strides"),
    [
        ("imagenet", 6, [8, 8, 16, 16, 32, 32]),
        ("imagenet", 7, [8, 8, 16, 16, 32, 32, 32]),
        ("cifar", 4, [1, 2, 4, 4]),
        ("cifar", 5, [1, 2, 2, 4, 4]),
    ],
)
def test_features_have_the_declared_channels_and_strides(stem, cells, strides):
    network = CellNetwork(FLATNESS_C100, 4, cells, 5, stem=stem)
    seen = []
    for block in network.cells:
        block.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape[1:])))
    network(torch.zeros(2, 3, 64, 64))
    first = strides[0]
    assert seen == [(16 * stride // first, 64 // stride, 64 // stride) for stride in strides]
    assert [shape.out_channels for shape in network.shapes] == [channels for channels, _, _ in seen]


@pytest.mark.parametrize(("stem", "extra"), [("imagenet", 0), ("cifar", 2 * 768)])
def test_the_auxiliary_head_is_for_training_only(stem, extra):
    plain, network = (CellNetwork(FLATNESS_C100, 4, 3, 7, stem=stem, auxiliary=on) for on in (False, True))
    channels = network.shapes[2].out_channels
    # 1x1 to 128 with batch norm, 2x2 to 768 (with batch norm on CIFAR only), classifier.
    head = channels * 128 + 2 * 128 + 128 * 768 * 4 + extra + 768 * 7 + 7
    assert count_parameters(network) - count_parameters(plain) == head
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    logits, auxiliary = network(x)
    assert logits.shape == auxiliary.shape == (2, 7)
    auxiliary.sum().backward()
    assert network.classifier.weight.grad is None and network.cells[2].preprocess1.op[1].weight.grad is not None
    assert isinstance(network.eval()(x), torch.Tensor)
    weights = {k: v for k, v in network.state_dict().items() if not k.startswith("auxiliary_head")}
    plain.load_state_dict(weights)
    assert torch.equal(plain.eval()(x), network(x))


@pytest.mark.parametrize(
    ("stem", "size"), [("imagenet", 7), ("imagenet", 1), ("imagenet", 14), ("cifar", 8), ("cifar", 2)]
)
def test_the_auxiliary_head_takes_any_size(stem, size):
    head = AuxiliaryHead(16, 5, stem).eval()
    assert head(torch.zeros(2, 16, size, size)).shape == (2, 5)


def test_drop_path_acts_in_training_only():
    network = CellNetwork(FLATNESS_C100, 4, 3, 5, stem="cifar").eval()
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    plain = network(x)
    network.drop_path_prob = 0.6
    assert torch.equal(network(x), plain)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Batch statistics change the output in training too, so compare two draws.
        network.train()
        assert not torch.equal(network(x), network(x))
    network.drop_path_prob = 0.0
    assert torch.equal(network(x), network(x))


def test_drop_path_spares_the_identity():
    skips = Genotype([("skip_connect", 0), ("skip_connect", 1)] * 4, DARTS_V2.reduce)
    network = CellNetwork(skips, 4, 3, 5, stem="cifar")
    states = network.stem_states(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(network.cells[0](*states, 0.9), network.cells[0](*states, 0.0))


def test_counting_leaves_every_mode_as_it_was():
    network = CellNetwork(FLATNESS_C100, 4, 3, 5)
    network.train()
    network.cells[0].eval()
    before = [module.training for module in network.modules()]
    assert count_macs(network, 32) > 0
    assert [module.training for module in network.modules()] == before


def test_multiply_adds_of_one_convolution_by_hand():
    model = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
    assert count_macs(model, 32) == 16 * 16 * 8 * 3 * 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 3, "resnet"), r"stem 'resnet'.*imagenet, cifar"),
        ((5, 3, "cifar"), "even number, got 5"),
        ((0, 3, "cifar"), "even number, got 0"),
        ((4, 1, "cifar"), "at least 2.*got 1"),
    ],
)
def test_bad_shapes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        cell_shapes(*arguments)


def test_no_classes_are_refused():
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        CellNetwork(FLATNESS_C100, 4, 3, 0)
