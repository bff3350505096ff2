# DeepLab-v3 with a GeNAS backbone of stride 8: only the backbone of mmseg's ResNet model is replaced.
_base_ = "mmseg::_base_/models/deeplabv3_r50-d8.py"
custom_imports = {"imports": ["mmseg_backbones"], "allow_failed_imports": False}
norm_cfg = {"type": "SyncBN", "requires_grad": True}
# The official networks see RGB pixels from 0 to 1.
data_preprocessor = {"mean": [0.0, 0.0, 0.0], "std": [255.0, 255.0, 255.0]}
model = {
    "pretrained": None,
    "data_preprocessor": data_preprocessor,
    "backbone": {
        "_delete_": True,
        "type": "GeNASBackbone",
        "arch": "genas_flatness_c100",
        "output_stride": 8,
        "norm_cfg": norm_cfg,
        # Add the ImageNet weights: init_cfg=dict(type="Pretrained", checkpoint=FILE)
        "init_cfg": None,
    },
    # 16 and 8 times the network's 46 channels.
    "decode_head": {"in_channels": 736},
    "auxiliary_head": {"in_channels": 368},
}
