_base_ = [
    "_base_/deeplabv3_genas-d8.py",
    "mmseg::_base_/datasets/ade20k.py",
    "mmseg::_base_/default_runtime.py",
    "mmseg::_base_/schedules/schedule_80k.py",
]
crop_size = (512, 512)
data_preprocessor = {"size": crop_size}
model = {
    "data_preprocessor": data_preprocessor,
    "decode_head": {"num_classes": 150},
    "auxiliary_head": {"num_classes": 150},
}
