"""The card of a published network: its cells, what found it, how it was trained, what it costs, and what was measured.

What is not known is left out, or said to be unknown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from genas_plugins._messages import one_line
from genas_plugins.counting import count_macs, count_parameters
from genas_plugins.darts.genotype import Genotype
from genas_plugins.darts.zoo import OFFICIAL, ZOO
from timm_models.network import GenasNet
from timm_models.searches import FoundGenotype
from timm_models.trained import TrainedNetwork

__all__ = ["PICTURE", "UNKNOWN", "card_text", "describe"]

PICTURE = "cells.png"
UNKNOWN = "unknown"
_TAGS = ("image-classification", "timm", "genas", "neural-architecture-search")
_SHOWN_CLASSES = 10
# Settings of a training that a reader would repeat it with, as the launcher names them.
_RECIPE = (
    *("epochs", "batch_size", "global_batch_size", "grad_accum_steps", "opt", "lr", "momentum", "weight_decay"),
    *("sched", "warmup_epochs", "clip_grad", "smoothing", "auxiliary_weight", "drop", "drop_path", "scale", "ratio"),
    *("hflip", "color_jitter", "lighting", "aa", "reprob", "model_ema", "model_ema_decay"),
)
_CITATION = """@inproceedings{jeong2023genas,
  title     = {GeNAS: Neural Architecture Search with Better Generalization},
  author    = {Jeong, Joonhyun and Yu, Joonsang and Park, Geondo and Han, Dongyoon and Yoo, YoungJoon},
  booktitle = {Proceedings of the International Joint Conference on Artificial Intelligence (IJCAI)},
  year      = {2023}
}"""

Rows = Iterable[tuple[str, str | None]]


def card_text(
    network: TrainedNetwork, search: FoundGenotype | None, *, name: str, address: str, license: str | None
) -> str:
    """The card as Markdown with the front matter of the hub.

    Args:
        network: What is published; its model is a :class:`GenasNet`.
        search: What is known of the search; None: nothing.
        name: Headline.
        address: What ``timm.create_model`` opens it by, such as ``hf-hub:owner/name``.
        license: The hub's name of the licence of the weights; None: unknown.
    """
    tags = "".join(f"- {tag}\n" for tag in _TAGS)
    front = f"---\ntags:\n{tags}library_name: timm\npipeline_tag: image-classification\n"
    return f"{front}license: {license or UNKNOWN}\n---\n# {_safe(name)}\n\n{describe(network, search, address)}"


def describe(network: TrainedNetwork, search: FoundGenotype | None, address: str) -> str:
    """The card's text below its headline; arguments are those of :func:`card_text`."""
    model = network.model
    assert isinstance(model, GenasNet)
    sections = [
        "An image classifier of two kinds of cells, as they are searched in the space of DARTS; built and trained with "
        "genas-plugins.",
        f"![The normal and the reduction cell]({PICTURE})",
        f"## The network\n\n{_table(_network(network, model))}",
        f"Genotype, an operation number for each edge:\n\n```\n{model.genotype}\n```",
        f"## The search\n\n{_search(model.genotype, search)}",
        f"## The training\n\n{_training(network)}",
        f"## Use\n\n{_use(address)}",
        f"## Citation\n\n```bibtex\n{_CITATION}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def _network(network: TrainedNetwork, model: GenasNet) -> Rows:
    config = network.data_config or {}
    channels, height, width = config["input_size"]
    sizes = f"{model.num_cells} cells, {model.init_channels} channels in the first"
    yield "architecture", f"`{_safe(network.name)}`, {sizes}"
    names = ", ".join(map(_safe, network.class_names[:_SHOWN_CLASSES]))
    more = ", ..." * (len(network.class_names) > _SHOWN_CLASSES)
    yield "classes", f"{model.num_classes}" + (f" ({names}{more})" if names else "")
    yield "parameters", f"{count_parameters(model) / 1e6:.3f} M"
    macs = count_macs(model, height, channels) / 1e6
    yield "multiply-adds", f"{macs:,.{1 if macs >= 10 else 3}f} M for an image of {height} x {width} pixels"
    yield from _measured(network)
    resized = f"{config['interpolation']}, centre crop of {config['crop_pct']:g}"
    yield "images", f"{channels} channels, {height} x {width} pixels, {_safe(resized)}"
    yield "normalisation", f"pixels from 0 to 1, mean {_numbers(config['mean'])}, deviation {_numbers(config['std'])}"


def _measured(network: TrainedNetwork) -> Rows:
    count = network.images[1]
    images = "the training's validation images" if count is None else f"the training's {count:,} validation images"
    names = ("top1", "top5") if network.model.num_classes > 5 else ("top1",)
    for name in names:
        value = network.figures.get(name)
        told = UNKNOWN if value is None else f"{value:.2f} % of {images}"
        yield f"top-{name[3:]}", told
    if network.figures and network.checkpoint.name.startswith("model_best"):
        yield "", "of all epochs the best on these images, so on others a little lower is to be expected"


def _search(genotype: Genotype, search: FoundGenotype | None) -> str:
    published = next((entry for entry in ZOO.values() if entry.genotype == genotype), None)
    if search is None or not (search.record or search.provenance or search.settings):
        if published is not None:
            where = "with the GeNAS paper" if published.source == OFFICIAL else f"in {published.source}"
            return (
                f"The cells are those of `{published.name}`, published {where}: searched on "
                f"{published.search_dataset}, metric {published.metric}."
            )
        return "Unknown: nothing of the search came with the weights."
    return _table(_searched(search))


def _searched(search: FoundGenotype) -> Rows:
    record, known = search.record, search.provenance
    sections = {name: value for name, value in search.settings.items() if isinstance(value, Mapping)}
    data, score, training, evolution, space = (
        sections.get(name, {}) for name in ("data", "score", "training", "search", "space")
    )
    yield "images", _value(data.get("name", known.get("data")))
    yield "metric", _value(score.get("metric", known.get("metric")))
    yield "score", _value(record.get("score"))
    shares = record.get("shares")
    if isinstance(shares, Mapping):
        yield "shares of the score", ", ".join(f"{_safe(key)} {_share(value)}" for key, value in shares.items())
    for name in ("flatness", "angle"):
        yield name, _value(record.get(name))
    yield "sigmas of the noise", _value(record.get("sigmas", score.get("sigmas")))
    yield "losses at the sigmas", _value(record.get("losses"))
    yield "top-1 with the supernet's weights", None if search.test_top1 is None else f"{search.test_top1:.1%}"
    sizes = {name: space.get(name) for name in ("init_channels", "num_cells")} | {"epochs": training.get("epochs")}
    yield "supernet", _named(sizes)
    sizes = {name: evolution.get(name) for name in ("population", "generations", "parents", "mutants", "crossovers")}
    yield "evolution", _named(sizes)
    yield "candidates", _value(known.get("candidates"))
    yield "seed", _value(search.settings.get("seed", known.get("seed")))
    yield "versions", _named({name: known.get(name) for name in ("genas_plugins", "torch", "python")})


def _training(network: TrainedNetwork) -> str:
    if not network.settings:
        return "Unknown: the weights came without the settings of their training."
    counts = ("training", network.images[0]), ("validation", network.images[1])
    images = ", ".join(f"{count:,} for {name}" for name, count in counts if count is not None)
    # A folder's name says nothing to others, and may say more than its owner likes.
    source = network.settings.get("dataset")
    rows: list[tuple[str, str | None]] = [("data set", _value(source) or UNKNOWN), ("images", images or None)]
    if network.epoch is not None:
        rows.append(("weights", f"after epoch {network.epoch + 1}"))
    # What is 0 is off, one pass makes a step by itself, and without an average its decay decides nothing.
    silent = {"grad_accum_steps"} if network.settings.get("grad_accum_steps") == 1 else set()
    silent |= set() if network.settings.get("model_ema") else {"model_ema_decay"}
    told = [name for name in _RECIPE if network.settings.get(name) and name not in silent]
    rows += [(name, _value(network.settings[name])) for name in told]
    rows.append(("seed", _value(network.settings.get("seed"))))
    return _table(rows)


def _use(address: str) -> str:
    return f"""```bash
pip install 'genas-plugins[timm]'
```

```python
import timm
import timm_models  # registers the architecture

model = timm.create_model("{address}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
logits = model(transform(image).unsqueeze(0))  # of a Pillow image
```

With `features_only=True` it gives feature maps of strides 4, 8, 16 and 32."""


def _table(rows: Rows) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows if value]
    return "\n".join(["| | |", "|---|---|", *lines])


def _named(values: Mapping[str, Any]) -> str | None:
    return ", ".join(f"{name} {_value(value)}" for name, value in values.items() if value is not None) or None


def _value(value: Any) -> str | None:
    """A setting or a figure for a cell of a table; None: it is not known, or is off."""
    if value is None or value is False or value == "":
        return None
    if value is True:
        return "yes"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return _numbers(value)
    return _safe(value)


def _numbers(values: Iterable[Any]) -> str:
    return ", ".join(f"{value:.6g}" if isinstance(value, int | float) else _safe(value) for value in values)


def _share(value: Any) -> str:
    return f"{value:.1%}" if isinstance(value, int | float) else _safe(value)


def _safe(text: object) -> str:
    """Text of a user that is neither markup nor the end of a cell."""
    plain = one_line(text, 200)
    return "".join({"&": "&amp;", "<": "&lt;", ">": "&gt;"}.get(c, f"\\{c}" if c in "|`[]*\\" else c) for c in plain)
