"""Registers the networks of the zoo, and ``genas_cell`` for any genotype, with ``timm.create_model``."""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import nn

from genas_plugins.darts.zoo import OFFICIAL, ZOO
from timm_models.network import GenasFeatures, GenasNet
from timm_models.weights import check_pretrained

__all__ = ["GenasNet"]


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    if pretrained and not (cfg.has_weights or cfg.state_dict):
        advice = (
            "the authors of GeNAS publish ImageNet checkpoints in the model zoo of https://github.com/clovaai/GeNAS "
            "(Google Drive). Download one"
        )
        if variant in ZOO and ZOO[variant].source != OFFICIAL:
            advice = "GeNAS's model zoo does not have it. Train it (python -m timm_models.train)"
        raise RuntimeError(
            f"There is nothing to download for {variant}: {advice} and pass checkpoint_path=FILE instead of "
            "pretrained=True."
        )
    return build_model_with_cfg(
        GenasNet,
        variant,
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": GenasFeatures},
        pretrained_filter_fn=check_pretrained,
        **kwargs,
    )


def _cfg(**changes: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        # Images are scaled to 0..1 and not normalised: the official networks were trained without mean and deviation
        # (retrain_architecture/utils.py, get_train_transform).
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "first_conv": "stem0.0",
        "classifier": "classifier",
        "license": "mit",
        "origin_url": "https://github.com/clovaai/GeNAS",
        "paper_ids": "arXiv:2305.08611",
        **changes,
    }


def _origin(name: str) -> dict[str, Any]:
    """Where a genotype is from that is not in the official code; whose licence is that of weights there are none of."""
    if name not in ZOO or ZOO[name].source == OFFICIAL:
        return {}
    return {"origin_url": f"https://github.com/{ZOO[name].source.partition('@')[0]}", "license": None}


# Before the registration, which reads them.
default_cfgs = generate_default_cfgs({name: _cfg(**_origin(name)) for name in (*ZOO, "genas_cell")})


def _register(name: str) -> None:
    entry = ZOO[name]

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        arguments = {"genotype": entry.genotype, "init_channels": entry.init_channels, **kwargs}
        return _create(name, pretrained, **arguments)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = (
        f"The genotype searched on {entry.search_dataset} by {entry.metric}: {entry.init_channels} channels, "
        f"{entry.params / 1e6:.2f} M parameters, {entry.macs_million:.0f} M multiply-adds at 224 pixels."
    )
    globals()[name] = register_model(build)


for _name in ZOO:
    _register(_name)


@register_model
def genas_cell(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A network of any ``genotype``; ``init_channels`` is by default the largest within 600 M multiply-adds."""
    if kwargs.get("genotype") is None:
        raise ValueError(
            "genas_cell needs genotype=...: a Genotype, a name of the zoo, the JSON file of a search, or 28 integers."
        )
    return _create("genas_cell", pretrained, **kwargs)
