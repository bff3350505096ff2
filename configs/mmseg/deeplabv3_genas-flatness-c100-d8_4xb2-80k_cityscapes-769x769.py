_base_ = [
    "_base_/deeplabv3_genas-d8.py",
    "mmseg::_base_/datasets/cityscapes_769x769.py",
    "mmseg::_base_/default_runtime.py",
    "mmseg::_base_/schedules/schedule_80k.py",
]
crop_size = (769, 769)
data_preprocessor = {"size": crop_size}
model = {
    "data_preprocessor": data_preprocessor,
    "decode_head": {"align_corners": True},
    "auxiliary_head": {"align_corners": True},
    "test_cfg": {"mode": "slide", "crop_size": crop_size, "stride": (513, 513)},
}
