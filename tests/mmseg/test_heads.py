"""The lists in docs/mmseg.md of what runs without mmcv's compiled operations: each entry is built and run."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import mmcv.ops
import mmseg
import mmseg.models.backbones
import mmseg.models.decode_heads
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from mmseg.utils import register_all_modules

register_all_modules()
DOCUMENT = Path(__file__).parents[2] / "docs" / "mmseg.md"
CONFIGS = Path(mmseg.__file__).parent / ".mim" / "configs"
COMPILED = hasattr(sys.modules["mmcv._ext"], "__file__")
CHANNELS = (4, 16, 32, 64)
KNET = "knet/knet-s3_r50-d8_fcn_8xb2-adamw-80k_ade20k-512x512"
HAM = "segnext/segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512"
# MMSegmentation's own configuration of each head.
HEADS = {
    "ANNHead": "ann_r50-d8",
    "APCHead": "apcnet_r50-d8",
    "ASPPHead": "deeplabv3_r50-d8",
    "CCHead": "ccnet_r50-d8",
    "DAHead": "danet_r50-d8",
    "DMHead": "dmnet_r50-d8",
    "DNLHead": "dnl_r50-d8",
    "DepthwiseSeparableASPPHead": "deeplabv3plus_r50-d8",
    "DepthwiseSeparableFCNHead": "fast_scnn",
    "EMAHead": "emanet_r50-d8",
    "EncHead": "encnet_r50-d8",
    "FCNHead": "fcn_r50-d8",
    "FPNHead": "fpn_r50",
    "GCHead": "gcnet_r50-d8",
    "ISAHead": "isanet_r50-d8",
    "IterativeDecodeHead": KNET,
    "LRASPPHead": "lraspp_m-v3-d8",
    "LightHamHead": HAM,
    "NLHead": "nonlocal_r50-d8",
    "OCRHead": "ocrnet_r50-d8",
    "PSAHead": "psanet_r50-d8",
    "PSPHead": "pspnet_r50-d8",
    "PointHead": "pointrend_r50",
    "SETRUPHead": "setr_pup",
    "STDCHead": "stdc",
    "SegformerHead": "segformer_mit-b0",
    "SegmenterMaskTransformerHead": "segmenter_vit-b16_mask",
    "UPerHead": "upernet_r50",
}
# Parts of IterativeDecodeHead.
PARTS = {"KernelUpdateHead", "KernelUpdator"}


def listed(beginning: str) -> set[str]:
    """The names in the paragraph of the document that begins so."""
    paragraphs = DOCUMENT.read_text(encoding="utf-8").split("\n\n")
    (found,) = (paragraph for paragraph in paragraphs if paragraph.startswith(beginning))
    return set(re.findall(r"`(\w+)`", found))


def test_every_head_of_mmsegmentation_is_in_one_list() -> None:
    works, compiled = listed("Heads that run without"), listed("`PSAHead` needs")
    others = listed("Not for these backbones")
    assert works | compiled == set(HEADS)
    assert not works & compiled and not others & set(HEADS)
    assert works | compiled | others | PARTS == set(mmseg.models.decode_heads.__all__)


def on_ours(name: str) -> Any:
    """The segmentor of MMSegmentation's configuration with our backbone, in the way that docs/mmseg.md says."""
    path = HEADS[name] if "/" in HEADS[name] else f"_base_/models/{HEADS[name]}"
    model = Config.fromfile(CONFIGS / f"{path}.py").model
    for part in ("data_preprocessor", "pretrained", *(["auxiliary_head"] * (name != "STDCHead"))):
        model.pop(part, None)
    model.backbone = {"type": "GeNASBackbone", "arch": "genas_flatness_c100", "init_channels": 4, "output_stride": 8}
    neck = model.get("neck")
    if neck:
        neck.in_channels = list(CHANNELS)
    adapted = {part: adjusted(model[part], fed=not neck) for part in model if part.endswith("_head")}
    return MODELS.build(ConfigDict({**model, **adapted}))


def adjusted(node: Any, *, fed: bool) -> Any:
    """Settings with the channels of our features, if the backbone feeds the head, and normalisation for one process."""
    if isinstance(node, list | tuple):
        return [adjusted(each, fed=fed) for each in node]
    if not isinstance(node, dict):
        return node
    kept = ("in_channels", "in_index")
    node = {key: value if key in kept else adjusted(value, fed=fed) for key, value in node.items()}
    if node.get("type") == "SyncBN":
        node["type"] = "BN"
    if fed and "channels" in node and "in_channels" in node:
        index = node.get("in_index", -1)
        several = isinstance(index, list | tuple)
        node["in_channels"] = [CHANNELS[each] for each in index] if several else CHANNELS[index]
    if "c1_in_channels" in node:
        node["c1_in_channels"] = CHANNELS[0]
    return node


def train_and_predict(model: Any, size: int) -> None:
    torch.manual_seed(0)
    head = model.decode_head[-1] if isinstance(model.decode_head, torch.nn.ModuleList) else model.decode_head
    meta = {"img_shape": (size, size), "ori_shape": (size, size)}
    samples = []
    for _ in range(2):
        mask = torch.randint(head.num_classes, (1, size, size))
        samples.append(SegDataSample(gt_sem_seg=PixelData(data=mask), metainfo=meta))
    images = torch.randn(2, 3, size, size)
    total = model.train().parse_losses(model.loss(images, samples))[0]
    total.backward()
    assert bool(total.isfinite())
    assert any(value.grad is not None and bool(value.grad.any()) for value in model.backbone.parameters())
    with torch.no_grad():
        (first, _) = model.eval().predict(images, samples)
    assert first.pred_sem_seg.data.shape == (1, size, size)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_trains_and_predicts_on_our_backbone(name: str) -> None:
    model = on_ours(name)
    # LRASPPHead averages over 49 x 49 of the features.
    size = 416 if name == "LRASPPHead" else 64
    if COMPILED or name in listed("Heads that run without"):
        train_and_predict(model, size)
        return
    with pytest.raises(RuntimeError, match=r"psamask_forward is one of mmcv's compiled operations"):
        train_and_predict(model, size)


NORM = {"type": "BN"}
SMALL_RESNET = {"type": "ResNet", "depth": 18, "out_indices": (0, 1, 2, 3), "norm_cfg": NORM}
SMALL_STDC = {"type": "STDCNet", "stdc_type": "STDCNet1", "in_channels": 3, "bottleneck_type": "cat", "num_convs": 4}
SMALL_STDC |= {"channels": (32, 64, 256, 512, 1024), "norm_cfg": NORM, "act_cfg": {"type": "ReLU"}}
SMALL_STDC["with_final_conv"] = False
VIT = {"img_size": 64, "embed_dims": 48, "num_layers": 2, "num_heads": 4, "out_indices": -1}
TWINS = {"embed_dims": [8, 16, 24, 32], "num_heads": [1, 2, 3, 4], "mlp_ratios": [2, 2, 2, 2], "depths": [1, 1, 1, 1]}
TWINS |= {"out_indices": (0, 1, 2, 3), "qkv_bias": True, "norm_cfg": {"type": "LN"}, "sr_ratios": [8, 4, 2, 1]}
HRNET = {
    f"stage{number}": {
        "num_modules": 1,
        "num_branches": number,
        "block": "BOTTLENECK" if number == 1 else "BASIC",
        "num_blocks": (1,) * number,
        "num_channels": (8, 16, 32, 64)[:number],
    }
    for number in (1, 2, 3, 4)
}
CONTEXT = {"spatial_channels": (64, 64, 64, 128), "context_channels": (128, 256, 512), "out_channels": 256}
# Small ones of each kind; those that are not here need no arguments.
BACKBONES: dict[str, dict[str, Any]] = {
    "BEiT": {**VIT, "qv_bias": True, "init_values": 0.1},
    "BiSeNetV1": {"backbone_cfg": {**SMALL_RESNET, "strides": (1, 2, 2, 2)}, **CONTEXT},
    "HRNet": {"extra": HRNET},
    "ICNet": {"backbone_cfg": {**SMALL_RESNET, "type": "ResNetV1c"}, "layer_channels": (128, 512)},
    "MAE": {**VIT, "init_values": 0.1},
    "MixVisionTransformer": {"embed_dims": 8, "num_layers": [1, 1, 1, 1]},
    "PCPVT": TWINS,
    "ResNeSt": {"depth": 50},
    "ResNeXt": {"depth": 50, "groups": 32, "base_width": 4},
    "ResNet": {"depth": 18},
    "ResNetV1c": {"depth": 18},
    "ResNetV1d": {"depth": 18},
    "STDCContextPathNet": {
        "backbone_cfg": SMALL_STDC,
        "last_in_channels": (1024, 512),
        "out_channels": 128,
        "ffm_cfg": {"in_channels": 384, "out_channels": 256, "scale_factor": 4},
    },
    "STDCNet": {key: value for key, value in SMALL_STDC.items() if key != "type"},
    "SVT": {**TWINS, "windiow_sizes": [7, 7, 7, 7]},
    "SwinTransformer": {"embed_dims": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4)},
    "TIMMBackbone": {"model_name": "resnet18", "features_only": True, "pretrained": False},
    "VisionTransformer": VIT,
}


def test_every_backbone_of_mmsegmentation_is_in_one_list() -> None:
    works, others = listed("Backbones of MMSegmentation that run without"), {"VPD"}
    assert works | others == set(mmseg.models.backbones.__all__)
    assert not works & others


@pytest.mark.parametrize("name", sorted(set(mmseg.models.backbones.__all__) - {"VPD"}))
def test_a_backbone_runs(name: str) -> None:
    assert name in listed("Backbones of MMSegmentation that run without")
    backbone = MODELS.build({"type": name, **BACKBONES.get(name, {})})
    torch.manual_seed(0)
    features = backbone(torch.randn(2, 3, 64, 64))
    features = features if isinstance(features, list | tuple) else [features]
    assert features and all(len(feature) == 2 and bool(feature.isfinite().all()) for feature in features)


@pytest.mark.parametrize("kind", ["DCN", "DCNv2"])
def test_deformable_convolutions_need_the_compiled_operations(kind: str) -> None:
    deformable = {"type": kind, "deform_groups": 1, "fallback_on_stride": False}
    backbone = MODELS.build(
        {"type": "ResNet", "depth": 50, "dcn": deformable, "stage_with_dcn": (False, False, False, True)}
    )
    # Its last features have to be as large as the kernel.
    images = torch.randn(2, 3, 96, 96)
    if COMPILED:
        assert backbone(images)[-1].shape == (2, 2048, 3, 3)
        return
    with pytest.raises(RuntimeError, match=r"deform_conv_forward is one of mmcv's compiled operations"):
        backbone(images)


@pytest.mark.skipif(COMPILED, reason="mmcv has its compiled operations here")
def test_what_needs_them_on_a_gpu_only() -> None:
    """FocalLoss calls the operation for tensors on a GPU, and deformable attention likewise; here others serve."""
    # Its form for a CPU misreads labels that are numbers; these are probabilities.
    labels = torch.nn.functional.one_hot(torch.randint(4, (2, 8, 8)), 4).movedim(3, 1)
    assert bool(MODELS.build({"type": "FocalLoss"})(torch.randn(2, 4, 8, 8), labels).isfinite())
    with pytest.raises(RuntimeError, match=r"sigmoid_focal_loss_forward is one of mmcv's compiled operations"):
        mmcv.ops.sigmoid_focal_loss(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), 2.0, 0.25, None, "none")
    attention = mmcv.ops.MultiScaleDeformableAttention(embed_dims=16, num_heads=2, num_levels=1)
    shapes, starts = torch.tensor([[4, 4]]), torch.tensor([0])
    query = torch.randn(16, 1, 16)
    points = torch.rand(1, 16, 1, 2)
    out = attention(query, value=query, reference_points=points, spatial_shapes=shapes, level_start_index=starts)
    assert out.shape == query.shape
    with pytest.raises(RuntimeError, match=r"ms_deform_attn_forward is one of mmcv's compiled operations"):
        mmcv.ops.multi_scale_deform_attn.MultiScaleDeformableAttnFunction.apply(
            torch.randn(1, 16, 2, 8), shapes, starts, torch.rand(1, 16, 2, 1, 4, 2), torch.rand(1, 16, 2, 1, 4), 1
        )
