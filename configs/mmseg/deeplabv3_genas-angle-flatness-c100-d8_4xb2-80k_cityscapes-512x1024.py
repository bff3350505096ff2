_base_ = "deeplabv3_genas-flatness-c100-d8_4xb2-80k_cityscapes-512x1024.py"
# The network has 48 channels; its last feature 16 times as many, the one before 8 times.
model = {
    "backbone": {"arch": "genas_angle_flatness_c100"},
    "decode_head": {"in_channels": 768},
    "auxiliary_head": {"in_channels": 384},
}
