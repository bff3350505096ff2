# RetinaNet with Detectron2's default schedule; only the backbone is replaced. For 16 images in a step, COCO 2017.
from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from detectron2_backbones import GeNASBackbone
from genas_plugins.darts.zoo import ZOO

ARCH = "genas_flatness_c100"

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x
model = model_zoo.get_config("common/models/retinanet.py").model
optimizer = model_zoo.get_config("common/optim.py").SGD
# Add the ImageNet weights: train.init_checkpoint=FILE. Without any, FrozenBN refuses to train.
train = model_zoo.get_config("common/train.py").train

model.backbone.bottom_up = L(GeNASBackbone)(
    arch=ARCH,
    out_features="${..in_features}",
    norm="FrozenBN",
    # The stem and the cells up to res3.
    freeze_at=2,
)
# The last feature has 16 times as many channels as the first cells.
model.backbone.top_block.in_channels = 16 * ZOO[ARCH].init_channels
# The official networks see RGB pixels from 0 to 1.
model.pixel_mean = [0.0, 0.0, 0.0]
model.pixel_std = [255.0, 255.0, 255.0]
model.input_format = "RGB"
dataloader.train.mapper.image_format = "${model.input_format}"
dataloader.train.mapper.use_instance_mask = False
optimizer.lr = 0.01
