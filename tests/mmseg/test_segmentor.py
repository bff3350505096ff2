"""Whole segmentors from our configurations: their crops in training, odd sizes and several scales in testing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from mmseg.utils import register_all_modules
from torch import Tensor

from genas_plugins.files import packaged_configs

register_all_modules()
CONFIGS = packaged_configs("mmseg", ".py")
CITYSCAPES = "deeplabv3_genas-flatness-c100-d8_4xb2-80k_cityscapes-512x1024"
ODD = "deeplabv3_genas-flatness-c100-d8_4xb2-80k_cityscapes-769x769"
PLUS = "deeplabv3plus_genas-flatness-c100-d8_4xb2-80k_cityscapes-512x1024"
ADE20K = "deeplabv3_genas-flatness-c100-d8_4xb4-80k_ade20k-512x512"


def build(name: str, code: list[int] | None, channels: int | None = 2, head: int = 8) -> tuple[Any, tuple[int, int]]:
    """The configuration's segmentor, narrow and of few operations, with normalisation for one process; its crop."""
    config = Config.fromfile(CONFIGS[name])
    model = config.model
    norm = {"type": "BN", "requires_grad": True}
    for part in ("backbone", "decode_head", "auxiliary_head"):
        model[part].norm_cfg = norm
    if code is not None:
        model.backbone.arch = code
    if channels is not None:
        model.backbone.init_channels = channels
        model.decode_head.update(in_channels=16 * channels, channels=head)
        model.auxiliary_head.update(in_channels=8 * channels, channels=head)
        if "c1_in_channels" in model.decode_head:
            model.decode_head.update(c1_in_channels=channels, c1_channels=head)
    torch.manual_seed(0)
    return MODELS.build(model), tuple(config.crop_size)


def train_step(model: Any, images: Tensor, classes: int) -> dict[str, Tensor]:
    """Forward and backward of one batch; the losses."""
    generator = torch.Generator().manual_seed(1)
    samples = []
    for _ in images:
        mask = torch.randint(classes, (1, *images.shape[2:]), generator=generator)
        samples.append(SegDataSample(gt_sem_seg=PixelData(data=mask)))
    losses = model.train().loss(images, samples)
    model.parse_losses(losses)[0].backward()
    return losses


def sizes_of(crop: tuple[int, int]) -> list[tuple[int, int]]:
    """Stride 4, then 8: the features of a crop of 769 pixels have 97 rows."""
    return [tuple(-(-length // stride) for length in crop) for stride in (4, 8, 8, 8)]


@pytest.mark.parametrize("name", [CITYSCAPES, ODD, PLUS, ADE20K])
def test_sizes_at_the_crop_of_the_configuration(name: str, code: list[int]) -> None:
    with torch.device("meta"):
        model, crop = build(name, code)
        images = torch.empty(2, 3, *crop)
    features = model.train().backbone(images)
    assert [tuple(feature.shape[2:]) for feature in features] == sizes_of(crop)
    logits = model.decode_head(features)
    assert tuple(logits.shape) == (2, model.decode_head.num_classes, *sizes_of(crop)[0 if name == PLUS else 3])


@pytest.mark.parametrize("name", [CITYSCAPES, ODD, PLUS, ADE20K])
def test_a_training_step(name: str, code: list[int]) -> None:
    model, crop = build(name, code)
    # An eighth: even crops stay even, and 97 is odd at every stride as 769 is.
    crop = tuple(-(-length // 8) for length in crop)
    classes = model.decode_head.num_classes
    sizes = []
    model.backbone.register_forward_hook(lambda module, args, out: sizes.extend(tuple(f.shape[2:]) for f in out))
    losses = train_step(model, torch.randn(2, 3, *crop), classes)
    assert sizes == sizes_of(crop)
    # An untrained classifier is about as good as guessing.
    guess = torch.tensor(float(classes)).log()
    assert 0.7 * guess < losses["decode.loss_ce"] < 1.5 * guess
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", [CITYSCAPES, ODD])
def test_a_training_step_of_the_real_network_at_its_crop(name: str) -> None:
    model, crop = build(name, None, channels=None)
    losses = train_step(model, torch.randn(2, 3, *crop), 19)
    assert bool(losses["decode.loss_ce"].isfinite())
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())


@pytest.mark.parametrize("name", [CITYSCAPES, ODD, PLUS])
def test_masks_of_any_size_have_the_size_of_the_image(name: str, code: list[int]) -> None:
    model, _ = build(name, code)
    for size in ((97, 161), (65, 64)):
        (sample,) = model.eval().predict(torch.randn(1, 3, *size))
        assert sample.pred_sem_seg.data.shape == (1, *size)
        assert sample.seg_logits.data.shape == (19, *size)
        assert torch.equal(sample.seg_logits.data.argmax(0, keepdim=True), sample.pred_sem_seg.data)
    with pytest.raises(ValueError, match=r"at least 32 pixels on each side, got \(1, 1\)"):
        model.eval()(torch.randn(1, 3, 1, 1), mode="tensor")


def test_sliding_windows_agree_with_the_whole_where_one_window_covers_it(code: list[int]) -> None:
    model, crop = build(ODD, code)
    model.eval()
    assert (model.test_cfg.mode, tuple(model.test_cfg.crop_size)) == ("slide", crop)
    images = torch.randn(1, 3, 129, 193)
    metas = [{"img_shape": (129, 193), "ori_shape": (129, 193), "pad_shape": (129, 193)}]
    with torch.no_grad():
        slid = model.slide_inference(images, metas)
        torch.testing.assert_close(slid, model.whole_inference(images, metas))
        # And larger than a window, at odd sizes.
        model.test_cfg.update(crop_size=(97, 97), stride=(65, 65))
        assert model.slide_inference(torch.randn(1, 3, 101, 127), metas).shape == (1, 19, 101, 127)


@torch.no_grad()
def test_scales_and_flips_are_averaged(code: list[int]) -> None:
    model, _ = build(CITYSCAPES, code)
    model.eval()
    tta = MODELS.build({"type": "SegTTAModel", "module": model})
    image = torch.randn(3, 65, 97)
    batches: dict[str, list[Any]] = {"inputs": [], "data_samples": []}
    expected = torch.zeros(19, 65, 97)
    for size in ((65, 97), (49, 73), (97, 145)):
        scaled = torch.nn.functional.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
        for flip in (False, True):
            given = scaled.flip(2) if flip else scaled
            meta = {"ori_shape": (65, 97), "img_shape": size, "pad_shape": size, "img_path": "x"}
            meta |= {"flip": flip, "flip_direction": "horizontal"}
            batches["inputs"].append(given[None])
            batches["data_samples"].append([SegDataSample(metainfo=meta)])
            logits = model.encode_decode(given[None], [meta])
            logits = logits.flip(3) if flip else logits
            resized = torch.nn.functional.interpolate(logits, size=(65, 97), mode="bilinear", align_corners=False)
            expected += resized[0].softmax(0) / 6
    model.data_preprocessor = _Identity()
    (merged,) = tta.test_step(batches)
    agreement = (merged.pred_sem_seg.data == expected.argmax(0)).float().mean()
    assert agreement > 0.999


class _Identity(torch.nn.Module):
    """The images are as the network takes them."""

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        return {"inputs": data["inputs"], "data_samples": data["data_samples"]}
