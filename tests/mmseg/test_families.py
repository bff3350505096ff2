"""OpenMMLab's packages and OneDL's fork of them, which have the same import names: told apart by their metadata."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE

from mmseg_backbones import compatibility
from mmseg_backbones._distributions import check_families, fork_is_installed

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Writes the metadata of installed distributions, as pip does; those of this environment are hidden."""
    folders: list[str] = []

    def command(folder: str = "site", **versions: str) -> Path:
        for name, version in versions.items():
            info = tmp_path / folder / f"{name}-{version}.dist-info"
            info.mkdir(parents=True)
            metadata = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
            (info / "METADATA").write_text(metadata)
        folders.append(str(tmp_path / folder))
        monkeypatch.setattr("sys.path", [*dict.fromkeys(folders)])
        return tmp_path / folder

    return command


ORIGINAL = {"mmcv_lite": "2.1.0", "mmengine": "0.10.7", "mmsegmentation": "1.2.2"}
FORK = {"onedl_mmcv": "2.3.6", "onedl_mmengine": "0.10.12", "onedl_mmsegmentation": "1.4.2"}


@pytest.mark.parametrize(
    ("versions", "fork"),
    [
        (ORIGINAL, False),
        (FORK, True),
        # pip install '.[mmseg]' after mmcv was compiled.
        ({**ORIGINAL, "mmcv": "2.1.0"}, False),
        ({"onedl_mmengine": "0.10.12"}, True),
        ({}, False),
    ],
)
def test_one_family_is_taken(install: Install, versions: dict[str, str], fork: bool) -> None:
    install(**versions)
    check_families()
    assert fork_is_installed() is fork


@pytest.mark.parametrize("package", ["mmcv", "mmengine", "mmseg"])
def test_both_over_one_another_are_refused_with_the_commands_that_mend_it(install: Install, package: str) -> None:
    own = {"mmcv": "mmcv_lite", "mmengine": "mmengine", "mmseg": "mmsegmentation"}[package]
    fork = {"mmcv": "onedl_mmcv", "mmengine": "onedl_mmengine", "mmseg": "onedl_mmsegmentation"}[package]
    install(**ORIGINAL, **{fork: FORK[fork]})
    with pytest.raises(ImportError) as refused:
        check_families()
    first, second = (f"{name.replace('_', '-')} {(ORIGINAL | FORK)[name]}" for name in (own, fork))
    assert str(refused.value) == (
        f"{first} and {second} are both installed as {package}, and each has overwritten files of the other: pip "
        f"uninstall -y {' '.join(sorted_names(own, fork))}, and then install one family again, with pip install "
        "'genas-plugins[mmseg]' (OpenMMLab) or 'genas-plugins[onedl]' (OneDL's fork)."
    )


def sorted_names(own: str, fork: str) -> list[str]:
    """All that is installed, in the order in which they are told: package by package."""
    return [name.replace("_", "-") for each in ORIGINAL for name in ([each, fork] if each == own else [each])]


def test_two_versions_of_mmcv_over_one_another_are_refused(install: Install) -> None:
    install(mmcv="2.2.0", mmcv_lite="2.1.0")
    with pytest.raises(ImportError, match=r"^mmcv 2\.2\.0 and mmcv-lite 2\.1\.0 are both installed as mmcv"):
        check_families()


def test_of_two_in_different_folders_the_first_is_used(install: Install) -> None:
    install("user", **FORK)
    install("system", **ORIGINAL)
    check_families()


@pytest.mark.parametrize(
    ("versions", "named"),
    [(ORIGINAL, "mmsegmentation"), (FORK, "onedl-mmsegmentation"), ({"mmengine": "0.10.7"}, "mmseg")],
)
def test_configurations_of_mmseg_are_found_whoever_distributes_it(
    install: Install, versions: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last is a folder of source on the path."""
    for before in ("mmsegmentation", "somebody-elses"):
        monkeypatch.setitem(MODULE2PACKAGE, "mmseg", before)
        install(f"site-of-{before}", **versions)
        compatibility.find_configurations()
        assert MODULE2PACKAGE["mmseg"] == named


def test_a_base_of_mmsegs_is_read_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.py").write_text("_base_ = 'mmseg::_base_/models/fcn_r50-d8.py'")
    assert Config.fromfile(tmp_path / "own.py").model.decode_head.type == "FCNHead"
    # Without metadata, as from a folder of source.
    monkeypatch.setitem(MODULE2PACKAGE, "mmseg", "mmsegmentation")
    monkeypatch.setattr(compatibility, "has_metadata", lambda name: False)
    compatibility.find_configurations()
    assert MODULE2PACKAGE["mmseg"] == "mmseg"
    assert Config.fromfile(tmp_path / "own.py").model.decode_head.type == "FCNHead"
