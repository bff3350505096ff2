"""What timm expects of every model: registry, counts, heads, gradients, dropout, layers."""

from __future__ import annotations

import functools
import itertools
import json
import math
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import GroupNorm, GroupNorm1, LayerNorm2d
from torch import nn

import genas_plugins
from genas_plugins import Genotype
from genas_plugins.counting import count_macs, count_parameters
from genas_plugins.darts.operations import Identity

# The data file itself, not what the package makes of it.
ZOO = json.loads((Path(genas_plugins.__file__).with_name("darts") / "zoo.json").read_text(encoding="utf-8"))
NAMES = list(ZOO)

IMPORT = """
import json, sys, warnings
import timm
before = timm.list_models()
warnings.simplefilter("error")
import timm_models
after = timm.list_models()
print(json.dumps([sorted(set(after) - set(before)), len(after) - len(before), timm.list_models(module="genas")]))
"""


def test_the_import_registers_the_zoo_and_nothing_of_timm_gives_way(warm, tmp_path):
    done = warm("torch")(IMPORT, folder=tmp_path)
    # A name that timm has would give a warning, here an error, and no new name.
    assert (done.status, done.stderr) == (0, "")
    new, count, module = json.loads(done.stdout)
    assert new == module == sorted([*NAMES, "genas_cell"])
    assert count == len(NAMES) + 1 == 17


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_what_its_entry_and_its_configuration_say(name):
    entry = ZOO[name]
    model = timm.create_model(name, device="meta").eval()
    assert count_parameters(model) == entry["params"]
    assert len(model.cells) == 14 and model.genotype == Genotype(entry["normal"], entry["reduce"])
    config, state = model.default_cfg, model.state_dict()
    assert config["architecture"] == name
    assert state[config["first_conv"] + ".weight"].shape == (entry["init_channels"] // 2, 3, 3, 3)
    assert state[config["classifier"] + ".weight"].shape == (1000, model.head_hidden_size)
    assert model.get_classifier() is model.get_submodule(config["classifier"])
    pooled: list[torch.Tensor] = []
    model.global_pool.register_forward_pre_hook(lambda module, args: pooled.append(args[0]))
    assert config["input_size"][1:] == (224, 224)
    assert count_macs(model) / 1e6 == pytest.approx(entry["macs_million"], abs=0.1)
    (features,) = pooled
    assert features.shape == (1, model.num_features, *config["pool_size"])
    features = torch.empty(2, *features.shape[1:], device="meta")
    assert model.forward_head(features).shape == (2, 1000) == (2, model.num_classes)
    # Two reductions double the channels, and a cell gives four times its own.
    assert model.num_features == model.head_hidden_size == 16 * entry["init_channels"]
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)


def test_the_configuration_says_where_cells_are_from():
    official, other, any_cells = (timm.get_pretrained_cfg(name) for name in (NAMES[0], "rlnas_c10", "genas_cell"))
    assert other.origin_url == "https://github.com/megvii-model/RLNAS" and other.license is None
    assert official.origin_url == any_cells.origin_url == "https://github.com/clovaai/GeNAS"
    assert official.license == "mit"


def test_the_data_configuration_is_that_of_the_official_training():
    config = timm.data.resolve_model_data_config(timm.create_model(NAMES[0], device="meta"))
    assert config["input_size"] == (3, 224, 224)
    # Pixels from 0 to 1, not normalised.
    assert config["mean"] == (0.0, 0.0, 0.0) and config["std"] == (1.0, 1.0, 1.0)
    # Resized to 256 pixels, and the middle 224 cut out.
    assert config["crop_pct"] * 256 == 224
    assert config["interpolation"] == "bilinear"


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name, images):
    model = timm.create_model(name, init_channels=4, num_classes=5, auxiliary=True)
    logits, auxiliary = model(images(4, 3, 64, 64))
    assert logits.shape == auxiliary.shape == (4, 5)
    (logits.square().sum() + auxiliary.square().sum()).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("form", ["genotype", "name", "code", "text", "json", "path"])
def test_a_genotype_may_be_given_in_any_form(form, tmp_path):
    entry = ZOO["sdarts_rs_c10"]
    genotype = Genotype(entry["normal"], entry["reduce"])
    file = genotype.save(tmp_path / "best.json", score=1.0)
    given = {
        "genotype": genotype,
        "name": "sdarts_rs_c10",
        "code": list(genotype.code),
        "text": str(genotype),
        "json": str(file),
        "path": file,
    }[form]
    model = timm.create_model("genas_cell", genotype=given, init_channels=50, device="meta")
    assert model.genotype == genotype
    assert count_parameters(model) == entry["params"]
    # A code has no order of pairs; all else keeps the published one, which numbers the tensors.
    if form not in ("code", "text"):
        assert [list(pair) for pair in model.genotype.normal] == entry["normal"]


def test_channels_are_fitted_where_none_are_given():
    # 46 channels need 579 M and the next even number more than 600 M.
    model = timm.create_model("genas_cell", genotype="genas_flatness_c100", device="meta")
    assert count_parameters(model) == 5_195_205


@pytest.mark.parametrize(
    ("pooling", "pool"),
    [
        ("avg", lambda x: x.mean((2, 3))),
        ("max", lambda x: x.amax((2, 3))),
        ("catavgmax", lambda x: torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)),
        ("", lambda x: x),
    ],
)
@pytest.mark.parametrize("reset", [False, True])
def test_pooling_and_no_classifier(small, images, pooling, pool, reset):
    x = images(2, 3, 64, 96)
    model = small(global_pool="avg" if reset else pooling, num_classes=10 if reset else 0).eval()
    if reset:
        model.reset_classifier(0, pooling)
    features = model.forward_features(x)
    assert model.num_classes == 0 and isinstance(model.get_classifier(), nn.Identity)
    torch.testing.assert_close(model(x), pool(features))
    assert model(x).shape[1] == model.head_hidden_size == model.num_features * (2 if pooling == "catavgmax" else 1)
    assert not any(name.startswith("classifier") for name in model.state_dict())


@pytest.mark.parametrize("pooling", ["avg", "max", "catavgmax"])
def test_a_new_classifier_keeps_all_else(small, images, pooling):
    model = small(global_pool=pooling, auxiliary=True, dtype=torch.float64).train()
    pooled = model.forward_head(features := torch.rand(2, model.num_features, 3, 2).double(), pre_logits=True)
    others = {name: value.clone() for name, value in model.state_dict().items() if "classifier" not in name}
    model.reset_classifier(5)
    assert model.training and all(module.training for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in others.items())
    assert torch.equal(model.forward_head(features, pre_logits=True), pooled)
    weight, bias = model.classifier.weight, model.classifier.bias
    torch.testing.assert_close(model.forward_head(features), pooled @ weight.T + bias)
    logits, auxiliary = model(images(2, 3, 32, 32, dtype=torch.float64))
    assert logits.shape == auxiliary.shape == (2, 5) == (2, model.num_classes)
    model.eval().reset_classifier(0)
    assert not any(module.training for module in model.modules())
    assert model.auxiliary_head is None and model.global_pool.pool_type == pooling


def test_a_new_classifier_leaves_frozen_layers_frozen(small):
    model = small(auxiliary=True).train()
    model.stem0.eval()
    before = {name: module.training for name, module in model.named_modules()}
    model.reset_classifier(5, "max")
    assert {name: module.training for name, module in model.named_modules()} == before


def test_a_new_classifier_is_created_where_the_network_is(small):
    model = small(auxiliary=True).to("meta", torch.bfloat16)
    model.reset_classifier(3, "catavgmax")
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert model.classifier.weight.shape == (3, 2 * model.num_features)


def test_without_classes_there_is_no_auxiliary_head(small, images):
    model = small(num_classes=0, auxiliary=True).train()
    assert model(images(2, 3, 64, 64)).shape == (2, model.num_features)


def test_dropout_before_the_classifier(small):
    model = small(drop_rate=0.25).train()
    features = torch.ones(500, model.num_features, 2, 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dropped = model.forward_head(features, pre_logits=True)
    assert sorted(dropped.unique().tolist()) == pytest.approx([0.0, 4 / 3])
    # Four standard errors of the kept fraction.
    error = math.sqrt(0.75 * 0.25 / dropped.numel())
    assert abs(float((dropped > 0).float().mean()) - 0.75) < 4 * error
    model.reset_classifier(3)
    assert model.head_drop.p == 0.25
    assert torch.equal(model.eval().forward_head(features, pre_logits=True), torch.ones_like(dropped))


def test_drop_path_zeroes_an_operation_for_a_whole_sample(small, images):
    # A normalisation without batch statistics: what is dropped elsewhere does not change an operation's output.
    model = small(drop_path_rate=0.4, norm_layer="groupnorm1").train()
    assert model.drop_path_prob == 0.4
    cell, outputs = model.cells[0], []
    for operation in cell._ops:
        operation.register_forward_hook(lambda module, args, out: outputs.append(out))
    identity = [isinstance(operation, Identity) for operation in cell._ops]
    assert any(identity) and not all(identity)
    cell.register_forward_hook(lambda module, args, out: outputs.append(out))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model(images(64, 3, 32, 32))
    nodes = outputs[8].chunk(4, dim=1)
    kept = torch.zeros(8, 64)
    for node in range(4):
        first, second = 2 * node, 2 * node + 1
        errors = {}
        for keep in itertools.product((0, 1), repeat=2):
            scales = [1.0 if identity[edge] else on / 0.6 for edge, on in zip((first, second), keep, strict=True)]
            expected = scales[0] * outputs[first] + scales[1] * outputs[second]
            errors[keep] = (nodes[node] - expected).abs().amax((1, 2, 3))
        for sample in range(64):
            keep = min(errors, key=lambda option: float(errors[option][sample]))
            assert errors[keep][sample] < 1e-5
            kept[first, sample], kept[second, sample] = keep
    droppable = kept[[edge for edge in range(8) if not identity[edge]]]
    # Four standard errors of the kept fraction; each edge draws for itself.
    assert abs(float(droppable.mean()) - 0.6) < 4 * math.sqrt(0.6 * 0.4 / droppable.numel())
    assert len({tuple(row) for row in droppable.tolist()}) == len(droppable)


def test_drop_path_can_change_and_is_off_in_evaluation(small, images):
    x = images(4, 3, 64, 64)
    model, plain = small(drop_path_rate=0.5), small()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(x), plain.eval()(x))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model.train()
        assert not torch.equal(model(x), model(x))
        model.drop_path_prob = 0.0
        assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("in_chans", [1, 5])
def test_other_input_channels(small, images, in_chans):
    model = small(in_chans=in_chans)
    assert model.stem0[0].weight.shape == (2, in_chans, 3, 3)
    assert model(images(2, in_chans, 64, 64)).shape == (2, 10)
    assert count_parameters(model) - count_parameters(small()) == (in_chans - 3) * 2 * 9


@pytest.mark.parametrize(
    ("norm_layer", "kind"),
    [
        ("groupnorm1", nn.GroupNorm),
        (GroupNorm1, nn.GroupNorm),
        (functools.partial(GroupNorm, num_groups=1), nn.GroupNorm),
        ("layernorm2d", LayerNorm2d),
        (LayerNorm2d, LayerNorm2d),
        ("batchnorm2d", nn.BatchNorm2d),
    ],
)
def test_other_normalisation(small, images, norm_layer, kind):
    # In double precision: of two channels, normalised, there is little more than the sign of a difference.
    model = small(norm_layer=norm_layer, auxiliary=True, dtype=torch.float64)
    batch_norms = sum(isinstance(module, nn.BatchNorm2d) for module in small(auxiliary=True).modules())
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm)]
    assert len(norms) == batch_norms and all(isinstance(module, kind) for module in norms)
    if kind is nn.GroupNorm:
        assert {module.num_groups for module in norms} == {1}
    x = images(2, 3, 64, 64, dtype=torch.float64)
    logits, _ = model.train()(x)
    assert bool(logits.isfinite().all())
    if kind is not nn.BatchNorm2d:
        # The image alone gives what it gives in a batch.
        torch.testing.assert_close(model(x[:1])[0], logits[:1])


@pytest.mark.parametrize(
    ("act_layer", "kind"), [("gelu", timm.layers.GELU), ("silu", nn.SiLU), (nn.Hardswish, nn.Hardswish)]
)
def test_other_activation(small, images, randomize, act_layer, kind):
    model = randomize(small(act_layer=act_layer, auxiliary=True)).eval()
    relus = sum(isinstance(module, nn.ReLU) for module in small(auxiliary=True).modules())
    kinds = [type(module) for module in model.modules() if "torch.nn.modules.activation" in type(module).__module__]
    kinds += [type(module) for module in model.modules() if isinstance(module, timm.layers.GELU)]
    assert len(kinds) == relus and set(kinds) == {kind}
    x = images(2, 3, 64, 64)
    logits = model(x)
    # Nothing that is read again was changed in place.
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    assert torch.equal(model(x), logits)
    plain = small()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "auxiliary" not in name})
    assert not torch.allclose(plain.eval()(x), logits)


def test_an_unknown_argument_is_an_error():
    for name in ("genas_cell", NAMES[0]):
        with pytest.raises(TypeError, match="'block_size'"):
            timm.create_model(name, genotype=NAMES[0], block_size=7, device="meta")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"genotype": None}, "genas_cell needs genotype=.*name of the zoo.*JSON file.*28 integers"),
        ({"genotype": [1, 2, 3]}, "28 operation numbers .* got 3"),
        ({"genotype": [8, *[0] * 27]}, "integer from 0 to 7, got 8"),
        ({"genotype": "genas_flatnes_c100"}, r"did you mean genas_flatness_c100\?.*darts_v2_c10"),
        ({"init_channels": 5}, "init_channels must be a positive even number, got 5"),
        ({"init_channels": 0}, "init_channels must be a positive even number, got 0"),
        ({"num_cells": 1}, "num_cells must be at least 2 .*, got 1"),
        ({"output_stride": 4}, "output_stride must be one of 8, 16, 32, got 4"),
        ({"output_stride": 64}, "output_stride must be one of 8, 16, 32, got 64"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("genas_cell", **{"genotype": NAMES[0], "init_channels": 4, "device": "meta", **arguments})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "nni-architecture"}, 'Expected a genotype with "format": "genas-genotype", got .nni-architecture'),
        ({"normal": [["conv_7x7", 0], *ZOO[NAMES[0]]["normal"][1:]], "code": None}, "Unknown operation 'conv_7x7'"),
        ({"normal": ZOO[NAMES[0]]["normal"][1:]}, r"must be 8 pairs \(operation, input\)"),
    ],
)
def test_a_bad_genotype_file_is_refused_by_name(tmp_path, change, message):
    data = {**Genotype(ZOO[NAMES[0]]["normal"], ZOO[NAMES[0]]["reduce"]).to_dict(), **change}
    (tmp_path / "genotype.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"genotype\.json: .*{message}"):
        timm.create_model("genas_cell", genotype=str(tmp_path / "genotype.json"), device="meta")


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_drop_path_rate_out_of_range_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=f"drop_path_rate must be at least 0 and below 1, got {rate}"):
        timm.create_model("genas_flatness_c100", drop_path_rate=rate, device="meta")


def test_foreign_arguments_are_refused_with_what_was_expected() -> None:
    with pytest.raises(TypeError, match=r"genotype must be a Genotype, a name of the zoo.*got 5"):
        timm.create_model("genas_cell", genotype=5)
    for name in ("norm_layer", "act_layer"):
        with pytest.raises(ValueError, match="cannot be left out"):
            timm.create_model("genas_flatness_c100", device="meta", **{name: ""})


def test_an_activation_with_weights_is_created_where_the_network_is() -> None:
    model = timm.create_model("genas_flatness_c100", act_layer="prelu", device="meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_stages_hold_every_cell_once() -> None:
    model = timm.create_model("genas_flatness_c100", device="meta")
    stages = model.stages()
    # Reduction cells at one and two thirds of 14 begin the later stages.
    assert [len(stage) for stage in stages] == [2, 4, 5, 5]
    assert [module for stage in stages[1:] for module in stage] == list(model.cells)
