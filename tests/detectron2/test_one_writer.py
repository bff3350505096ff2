"""The folder of a detector's training has one writer; an evaluation may write its results beside it."""

from __future__ import annotations

import threading
from argparse import Namespace
from pathlib import Path

import pytest

from genas_plugins.locking import FolderInUseError, lock_folder

pytest.importorskip("detectron2", reason="Detectron2 is not installed: docs/detectron2.md says how")

from detectron2_backbones import lazy_train_net, train_net
from detectron2_backbones._launch import only_writer

pytestmark = pytest.mark.detectron2


@pytest.mark.parametrize(
    ("main", "config", "setting"),
    [
        (train_net.main, "retinanet_genas_flatness_c100_FPN_1x", "OUTPUT_DIR {}"),
        (lazy_train_net.main, "retinanet_genas_flatness_c100_fpn_1x", "train.output_dir={}"),
    ],
)
def test_a_second_training_in_the_folder_is_refused(
    main: object, config: str, setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    with lock_folder(tmp_path / "run"):
        arguments = ["--config-file", config, *setting.format(tmp_path / "run").split()]
        thread = threading.Thread(target=lambda: found.append(main(arguments)))
        thread.start()
        thread.join()
    assert found == [1] and f"{tmp_path / 'run'} is in use by process " in capsys.readouterr().err


def test_an_evaluation_and_a_remote_folder_are_not_kept_out(tmp_path: Path) -> None:
    found = []

    def attempt(folder: str, **options: bool) -> None:
        try:
            with only_writer(folder, Namespace(**options)):
                found.append("in")
        except FolderInUseError:
            found.append("refused")

    with lock_folder(tmp_path):
        for folder, evaluates in ((str(tmp_path), True), ("s3://bucket/run", False), (str(tmp_path), False)):
            thread = threading.Thread(target=attempt, args=(folder,), kwargs={"eval_only": evaluates})
            thread.start()
            thread.join()
    assert found == ["in", "in", "refused"]
