"""Speed and memory of GeNAS backbones in their hosts, beside the hosts' own ResNet-50 under the same head.

* ``mmseg``: DeepLab-v3 at stride 8 with its auxiliary head: configs/mmseg's network and mmseg's deeplabv3_r50-d8.
* ``detectron2``: RetinaNet with FPN: configs/detectron2's network and Detectron2's retinanet_R_50_FPN_1x, with frozen
  batch normalisation and the first stages frozen, as both are trained.

Both take turns in one run (see networks.py). Training is forward, losses, backward and a step of SGD on images that are
on the device already; inference is the host's own, to masks of the images' size or to boxes. Weights are random, and
normalisation is per process. From a checkout that is installed::

    python benchmarks/dense.py mmseg
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

# The neighbouring scripts: running this one puts their folder on the path.
from networks import MODES, Arm, add_options, compare, environment, parse_options, prepare
from scoring import print_table, spread
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from genas_plugins.counting import count_parameters
from genas_plugins.files import packaged_configs

__all__ = ["main"]

OURS, RESNET = "genas_flatness_c100", "resnet50"


class DenseArm(Arm):
    """A host's whole network; its size is that of all of it."""

    def size(self) -> dict[str, int]:
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            self.model.eval()
            self.run()
        return {
            "parameters": count_parameters(self.model),
            "macs": counter.get_total_flops() // (2 * self.args.batch_size),
        }


class SegmentationArm(DenseArm):
    """An mmseg segmentor with normalised images and masks."""

    def make_batch(self, generator: torch.Generator) -> None:
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        args = self.args
        images = torch.randn(args.batch_size, 3, *args.crop, generator=generator)
        self.images = images.to(self.device, memory_format=self.layout)
        self.samples = []
        for _ in range(args.batch_size):
            mask = torch.randint(19, (1, *args.crop), generator=generator).to(self.device)
            self.samples.append(SegDataSample(gt_sem_seg=PixelData(data=mask)))

    def run(self) -> Tensor | None:
        if self.model.training:
            return self.model.parse_losses(self.model.loss(self.images, self.samples))[0]
        self.model.predict(self.images)
        return None


class DetectionArm(DenseArm):
    """A Detectron2 detector with 8-bit images and boxes."""

    def make_batch(self, generator: torch.Generator) -> None:
        from detectron2.structures import Boxes, Instances

        height, width = self.args.crop
        self.images = []
        for _ in range(self.args.batch_size):
            corners = torch.rand(8, 2, 2, generator=generator).sort(dim=1).values * torch.tensor([width, height])
            instances = Instances((height, width), gt_boxes=Boxes(corners.flatten(1)))
            instances.gt_classes = torch.randint(80, (8,), generator=generator)
            image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
            self.images.append({"image": image.to(self.device), "instances": instances.to(self.device)})

    def run(self) -> Tensor | None:
        from detectron2.utils.events import EventStorage

        # Where its losses log what they count.
        with EventStorage():
            out = self.model(self.images)
        return sum(out.values()) if self.model.training else None


def build_segmentor(name: str) -> nn.Module:
    """DeepLab-v3 of stride 8 for the 19 classes of Cityscapes."""
    # Before mmseg, which mmcv-lite cannot do without it.
    importlib.import_module("mmseg_backbones")
    from mmengine.config import Config
    from mmengine.hub import get_config
    from mmseg.registry import MODELS
    from mmseg.utils import register_all_modules

    register_all_modules()
    if name == RESNET:
        config = get_config("mmseg::deeplabv3/deeplabv3_r50-d8_4xb2-80k_cityscapes-512x1024.py")
    else:
        ours = "deeplabv3_genas-flatness-c100-d8_4xb2-80k_cityscapes-512x1024"
        config = Config.fromfile(packaged_configs("mmseg", ".py")[ours])
    for part in ("backbone", "decode_head", "auxiliary_head"):
        config.model[part].norm_cfg = {"type": "BN", "requires_grad": True}
    config.model.pretrained = None
    return MODELS.build(config.model)


def build_detector(name: str) -> nn.Module:
    """RetinaNet with FPN for the 80 classes of COCO."""
    from detectron2 import model_zoo
    from detectron2.config import get_cfg
    from detectron2.layers import FrozenBatchNorm2d
    from detectron2.modeling import build_model

    from detectron2_backbones import add_genas_config

    cfg = get_cfg()
    if name == RESNET:
        cfg.merge_from_file(model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    else:
        add_genas_config(cfg)
        cfg.merge_from_file(packaged_configs("detectron2", ".yaml")["retinanet_genas_flatness_c100_FPN_1x"])
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            # As after loading: statistics of their own, without which frozen normalisation is refused.
            nn.init.normal_(module.running_mean, std=0.01)
    return model


HOSTS: dict[str, tuple[Callable[[str], nn.Module], type[DenseArm], dict[str, tuple[int, int]]]] = {
    # The crops of a GPU are the paper's.
    "mmseg": (build_segmentor, SegmentationArm, {"cpu": (256, 256), "cuda": (512, 1024)}),
    "detectron2": (build_detector, DetectionArm, {"cpu": (256, 320), "cuda": (800, 1088)}),
}


def make_arm(name: str, args: argparse.Namespace) -> DenseArm:
    """The host's network with one of the two backbones."""
    build, arm, _ = HOSTS[args.host]
    torch.manual_seed(0)
    return arm(build(name), args)


def report(models: dict[str, dict[str, Any]]) -> None:
    """Print the two tables."""
    rows = []
    for name, model in models.items():
        speeds = [
            f"{statistics.median(s):.2f} ({min(s):.2f} - {max(s):.2f})" for s in model["images_per_second"].values()
        ]
        peaks = " / ".join(f"{model['memory_mb'][mode]:.0f}" if model["memory_mb"] else "-" for mode in MODES)
        rows.append([name, f"{model['parameters'] / 1e6:.2f}", f"{model['macs'] / 1e9:.1f}", *speeds, peaks])
    print_table(["median (min - max)", "params [M]", "MACs [G]", *(f"{m} [img/s]" for m in MODES), "peak [MB]"], rows)
    print_table(
        ["ratio of speeds by round", *MODES], [[f"ours / {RESNET}", *map(spread, models[RESNET]["ratio"].values())]]
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host", choices=HOSTS)
    parser.add_argument(
        "--crop", type=int, nargs=2, metavar=("H", "W"), help="(default: small on a CPU, on CUDA the paper's)"
    )
    parser.add_argument("--batch-size", type=int, help="(default: 2)")
    add_options(parser)
    args = parse_options(parser, arguments, (2, 2))
    args.crop = HOSTS[args.host][2][args.device] if args.crop is None else tuple(args.crop)
    if min(args.crop) < 64:
        parser.error(f"--crop must be at least 64 by 64, got {args.crop[0]} by {args.crop[1]}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    if args.memory_of:
        print(*prepare(args.memory_of[0], args.memory_of[1:], args, make_arm)[1].values())
        return 0
    record = environment(args)
    print(", ".join(f"{key}: {value}" for key, value in record.items()), flush=True)
    models = compare((OURS, RESNET), args, [sys.executable, __file__, *arguments, "--memory-of"], make_arm)
    report(models)
    if args.output:
        args.output.write_text(json.dumps({**record, "models": models}, indent=1, default=str) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
