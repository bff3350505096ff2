"""The widest network within a budget of multiply-adds, against counting every width."""

from __future__ import annotations

import pytest
import torch

from genas_plugins.counting import count_macs, count_parameters, fit_channels
from genas_plugins.darts.network import CellNetwork
from genas_plugins.darts.zoo import ZOO


def macs(name: str, channels: int, size: int = 64, cells: int = 3) -> int:
    with torch.device("meta"):
        return count_macs(CellNetwork(ZOO[name].genotype, channels, cells, 1000), size)


@pytest.mark.parametrize("name", ["genas_flatness_c100", "darts_v2_c10"])
def test_every_width_is_its_own_fit(name):
    genotype = ZOO[name].genotype
    counts = {channels: macs(name, channels) for channels in range(2, 14, 2)}
    for channels, needed in counts.items():
        assert fit_channels(genotype, needed, 64, 3) == channels
        assert fit_channels(genotype, needed + 0.5, 64, 3) == channels
        if channels > 2:
            assert fit_channels(genotype, needed - 1, 64, 3) == channels - 2


@pytest.mark.parametrize("name", ["genas_flatness_c100", "genas_flatness_c10"])
def test_the_papers_counts_as_budgets_give_the_papers_channels(name):
    entry = ZOO[name]
    # The counts are rounded to a thousand.
    assert fit_channels(entry.genotype, entry.macs_million * 1e6 + 1e3) == entry.init_channels
    assert fit_channels(entry.genotype, entry.macs_million * 1e6 - 1e3) == entry.init_channels - 2


def test_the_default_is_600_million_at_224_pixels():
    # 579 M with 46 channels; the paper's 52 channels need 610 M, which is more.
    assert fit_channels(ZOO["genas_flatness_c100"].genotype) == 46
    assert fit_channels(ZOO["genas_flatness_c10"].genotype) == 50


def test_smaller_images_and_fewer_cells_leave_room_for_more_channels():
    genotype = ZOO["pdarts_c10"].genotype
    assert fit_channels(genotype, 2e6, 32, 2) > fit_channels(genotype, 2e6, 64, 2) > fit_channels(genotype, 2e6, 64, 4)


def test_a_budget_too_small_is_refused_with_what_is_needed():
    genotype = ZOO["darts_v2_c10"].genotype
    least = macs("darts_v2_c10", 2)
    with pytest.raises(ValueError, match=rf"fits 0\.01 M .* needs {least / 1e6:.1f} M at 64 pixels"):
        fit_channels(genotype, 1e4, 64, 3)


def test_shared_parameters_count_once():
    layer = torch.nn.Linear(3, 5)
    assert count_parameters(torch.nn.Sequential(layer, layer)) == 3 * 5 + 5
