"""NNI's published samples of the hub's DARTS space as genotypes: the same networks, the same logits, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nni.nas.hub.pytorch import DARTS, ENAS, NASNet

from genas_plugins import CellNetwork, Genotype
from genas_plugins.darts.zoo import ZOO, find_genotype
from nni_strategy import genotype_from_hub, genotype_to_hub, published_genotypes
from nni_strategy.samples import SampleSpace

EIGHT = ["sep_conv_3x3", "max_pool_3x3", "dil_conv_5x5", "skip_connect"] * 2


def a_sample(**changes: Any) -> dict[str, Any]:
    """Node n takes inputs 1 and 0, in this order."""
    sample: dict[str, Any] = {}
    for cell in ("normal", "reduce"):
        for position, operation in enumerate(EIGHT):
            node, number = 2 + position // 2, position % 2
            sample[f"{cell}/op_{node}_{number}"] = operation
            sample[f"{cell}/input_{node}_{number}"] = [1 - number]
    return {**sample, **changes}


def test_the_published_architecture_is_the_one_of_the_paper(tmp_path: Path) -> None:
    genotypes = published_genotypes()
    assert genotypes == {"darts-v2": ZOO["darts_v2_c10"].genotype}
    # Users go on with a file, as with that of a search.
    path = genotypes["darts-v2"].save(tmp_path / "genotype.json")
    assert find_genotype(path) == ZOO["darts_v2_c10"].genotype


@pytest.mark.parametrize(("dataset", "classes", "size"), [("cifar", 10, 16), ("imagenet", 1000, 64)])
def test_the_network_of_a_genotype_is_that_of_nni(dataset: Any, classes: int, size: int) -> None:
    sample = genotype_to_hub(published_genotypes()["darts-v2"])
    torch.manual_seed(0)
    theirs = DARTS.frozen_factory(sample)(width=8, num_cells=5, dataset=dataset)
    ours = CellNetwork(genotype_from_hub(sample), 8, 5, classes, dataset)
    images = torch.randn(2, 3, size, size)
    theirs.train()(images)
    named, tensors = ours.state_dict(), theirs.state_dict()
    assert [value.shape for value in named.values()] == [value.shape for value in tensors.values()]
    ours.load_state_dict(dict(zip(named, tensors.values(), strict=True)))
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


def test_there_and_back() -> None:
    rng = np.random.default_rng(0)
    space = DARTS(width=4, num_cells=3)
    samples = SampleSpace(space)
    refused = 0
    for _ in range(300):
        sample = samples.to_sample(samples.sample(rng))
        inputs = [
            [sample[f"{cell}/input_{node}_{k}"] for k in (0, 1)]
            for cell in ("normal", "reduce")
            for node in (2, 3, 4, 5)
        ]
        if any(first == second for first, second in inputs):
            refused += 1
            with pytest.raises(ValueError, match=r"Node \d of the (normal|reduce) cell takes input \d twice"):
                genotype_from_hub(sample)
        else:
            assert genotype_to_hub(genotype_from_hub(sample)) == sample
    # A node with n inputs takes one twice in 1 of n cases: 1 - (1/2 * 2/3 * 3/4 * 4/5)^2 = 0.96 of the samples.
    assert 276 <= refused <= 298
    for name, entry in ZOO.items():
        if name == "fairdarts_b_c10":
            continue
        sample = genotype_to_hub(entry.genotype)
        assert space.contains(sample)
        back = genotype_from_hub({**sample, "width": 36, "depth": 20})
        assert (back.normal, back.reduce) == (entry.genotype.normal, entry.genotype.reduce)


def test_a_node_of_one_input_is_none_of_the_hub() -> None:
    with pytest.raises(ValueError, match=r"Node 3 of the normal cell has 1 input; in the hub's DARTS space .* two"):
        genotype_to_hub(ZOO["fairdarts_b_c10"].genotype)


@pytest.mark.parametrize(
    ("sample", "sentence"),
    [
        (
            a_sample(**{"normal/op_3_1": "conv_7x1_1x7"}),
            "normal cell .* operation 'conv_7x1_1x7', which the space of DARTS",
        ),
        (a_sample(**{"reduce/op_2_0": "none"}), "reduce cell of the sample has the operation 'none'"),
        (a_sample(**{"normal/input_4_1": [1]}), "Node 4 of the normal cell takes input 1 twice"),
        (a_sample(**{"normal/input_4_1": [4]}), "Node 4 of the normal cell cannot take input 4; valid inputs: 0 to 3"),
        (a_sample(**{"normal/input_4_1": [0, 1]}), "Node 4 of the normal cell cannot take input"),
        (a_sample(**{"reduce/op_6_0": "skip_connect"}), r"has a node 6; .* have the nodes \(2, 3, 4, 5\)"),
        (a_sample(**{"cell/0_1": "conv_3x3"}), "has the label 'cell/0_1', which the hub's DARTS space does not"),
        ({}, "lacks the label normal/op_2_0"),
        ({key: value for key, value in a_sample().items() if key != "reduce/input_5_1"}, "lacks .* reduce/input_5_1"),
    ],
)
def test_what_a_genotype_cannot_say_is_refused(sample: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        genotype_from_hub(sample)


@pytest.mark.parametrize(
    ("space", "sentence"), [(NASNet, "has the operation '.*', which the space"), (ENAS, "a node 6")]
)
def test_samples_of_the_hubs_other_cells_are_refused(space: Any, sentence: str) -> None:
    samples = SampleSpace(space(width=4, num_cells=3))
    with pytest.raises(ValueError, match=sentence):
        genotype_from_hub(samples.to_sample(samples.sample(np.random.default_rng(0))))


def test_the_order_of_a_nodes_inputs_is_kept() -> None:
    genotype = genotype_from_hub(a_sample())
    assert genotype.normal[:2] == (("sep_conv_3x3", 1), ("max_pool_3x3", 0))
    assert genotype == Genotype.from_code(genotype.code)
