# A narrow network on generated scenes, for two CPU cores and a few minutes: does training learn?
#
#   python -m mmseg_backbones.synthetic data/synthetic
#   python -m mmseg_backbones.train CONFIG
_base_ = [
    "_base_/deeplabv3_genas-d8.py",
    "mmseg::_base_/default_runtime.py",
    "mmseg::_base_/schedules/schedule_80k.py",
]
norm_cfg = {"type": "BN", "requires_grad": True}
crop_size = (128, 128)
data_preprocessor = {"size": crop_size}
model = {
    "data_preprocessor": data_preprocessor,
    "backbone": {"init_channels": 8, "norm_cfg": norm_cfg},
    # The network has 8 channels; the rates of the pyramid fit features of 16 pixels.
    "decode_head": {
        "in_channels": 128,
        "channels": 64,
        "dilations": (1, 2, 4, 6),
        "num_classes": 5,
        "norm_cfg": norm_cfg,
    },
    "auxiliary_head": {"in_channels": 64, "channels": 32, "num_classes": 5, "norm_cfg": norm_cfg},
}
dataset = {
    "type": "BaseSegDataset",
    "data_root": "data/synthetic",
    "metainfo": {
        "classes": ("sky", "lawn", "road", "house", "moon"),
        "palette": [[70, 130, 180], [107, 142, 35], [128, 64, 128], [178, 34, 34], [255, 255, 160]],
    },
    "img_suffix": ".png",
    "seg_map_suffix": ".png",
}
pack = {"type": "PackSegInputs"}
train_pipeline = [
    {"type": "LoadImageFromFile"},
    {"type": "LoadAnnotations"},
    {"type": "RandomResize", "scale": crop_size, "ratio_range": (0.75, 1.5), "keep_ratio": True},
    {"type": "RandomCrop", "crop_size": crop_size},
    {"type": "RandomFlip", "prob": 0.5},
    pack,
]
test_pipeline = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations"}, pack]
train_dataloader = {
    "batch_size": 8,
    "num_workers": 1,
    "persistent_workers": True,
    "sampler": {"type": "InfiniteSampler", "shuffle": True},
    "dataset": {
        **dataset,
        "data_prefix": {"img_path": "images/train", "seg_map_path": "masks/train"},
        "pipeline": train_pipeline,
    },
}
val_dataloader = {
    "batch_size": 1,
    "num_workers": 1,
    "persistent_workers": True,
    "sampler": {"type": "DefaultSampler", "shuffle": False},
    "dataset": {
        **dataset,
        "data_prefix": {"img_path": "images/val", "seg_map_path": "masks/val"},
        "pipeline": test_pipeline,
    },
}
test_dataloader = val_dataloader
val_evaluator = {"type": "IoUMetric", "iou_metrics": ["mIoU"]}
test_evaluator = val_evaluator
optim_wrapper = {
    "type": "OptimWrapper",
    "optimizer": {"type": "SGD", "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4},
}
param_scheduler = [{"type": "PolyLR", "eta_min": 1e-4, "power": 0.9, "begin": 0, "end": 400, "by_epoch": False}]
train_cfg = {"type": "IterBasedTrainLoop", "max_iters": 400, "val_interval": 200}
default_hooks = {
    "logger": {"interval": 20},
    "checkpoint": {"interval": 100, "max_keep_ckpts": 2},
    "visualization": {"draw": True, "interval": 10},
}
randomness = {"seed": 0}
