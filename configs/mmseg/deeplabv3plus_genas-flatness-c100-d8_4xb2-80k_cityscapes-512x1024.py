_base_ = "deeplabv3_genas-flatness-c100-d8_4xb2-80k_cityscapes-512x1024.py"
# DeepLab-v3+ refines with the stem's feature, of 46 channels at stride 4.
model = {"decode_head": {"type": "DepthwiseSeparableASPPHead", "c1_in_channels": 46, "c1_channels": 48}}
