_base_ = "deeplabv3_genas-flatness-c100-d8_4xb2-80k_cityscapes-512x1024.py"
# The network has 50 channels; its last feature 16 times as many, the one before 8 times.
model = {
    "backbone": {"arch": "pcdarts_c100"},
    "decode_head": {"in_channels": 800},
    "auxiliary_head": {"in_channels": 400},
}
