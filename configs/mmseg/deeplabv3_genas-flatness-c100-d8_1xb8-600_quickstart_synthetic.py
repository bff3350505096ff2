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
# The moon has one pixel in 25 and is not found in so few steps when all classes count alike. mmseg's weighted loss
# takes no ignored pixels, so crops are never padded.
class_weight = [1.0, 1.0, 1.0, 1.0, 2.0]
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
        "loss_decode": {"class_weight": class_weight},
    },
    "auxiliary_head": {
        "in_channels": 64,
        "channels": 32,
        "num_classes": 5,
        "norm_cfg": norm_cfg,
        "loss_decode": {"class_weight": class_weight},
    },
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
    {"type": "RandomResize", "scale": crop_size, "ratio_range": (1.0, 1.5), "keep_ratio": True},
    {"type": "RandomCrop", "crop_size": crop_size},
    {"type": "RandomFlip", "prob": 0.5},
    pack,
]
# For --tta: three scales, each also mirrored.
scales = [{"type": "Resize", "scale_factor": factor, "keep_ratio": True} for factor in (0.75, 1.0, 1.25)]
flips = [{"type": "RandomFlip", "prob": prob, "direction": "horizontal"} for prob in (0.0, 1.0)]
tta_pipeline = [
    {"type": "LoadImageFromFile"},
    {"type": "TestTimeAug", "transforms": [scales, flips, [{"type": "LoadAnnotations"}], [pack]]},
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
param_scheduler = [{"type": "PolyLR", "eta_min": 1e-4, "power": 0.9, "begin": 0, "end": 600, "by_epoch": False}]
train_cfg = {"type": "IterBasedTrainLoop", "max_iters": 600, "val_interval": 200}
default_hooks = {
    "logger": {"interval": 20},
    "checkpoint": {"interval": 100, "max_keep_ckpts": 2},
    "visualization": {"draw": True, "interval": 10},
}
randomness = {"seed": 0}
