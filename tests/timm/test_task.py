"""The auxiliary loss against its formula, with timm's targets, compiling, averaging and checkpoints."""

from __future__ import annotations

import argparse
import copy

import pytest
import timm
import torch
from timm.data import Mixup
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver
from torch import Tensor, nn

from timm_models import AuxiliaryClassificationTask

CLASSES = 10


@pytest.fixture
def model(small, randomize) -> nn.Module:
    return randomize(small(auxiliary=True, num_cells=2, dtype=torch.float64)).train()


@pytest.fixture
def batch(images) -> tuple[Tensor, Tensor]:
    return images(4, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 3, 3, 9])


def smoothed(logits: Tensor, target: Tensor, epsilon: float = 0.1) -> Tensor:
    """Cross entropy with ``(1 - epsilon) onehot + epsilon / K``, written out."""
    log_probabilities = logits - logits.exp().sum(1, keepdim=True).log()
    distribution = torch.full_like(logits, epsilon / CLASSES)
    for row, label in enumerate(target.tolist()):
        distribution[row, label] += 1.0 - epsilon
    return -(distribution * log_probabilities).sum() / len(logits)


@pytest.mark.parametrize("weight", [None, 0.0, 1.5])
def test_loss_and_gradients_by_formula(model, batch, weight):
    twin = copy.deepcopy(model)
    arguments = {} if weight is None else {"auxiliary_weight": weight}
    task = AuxiliaryClassificationTask(model, criterion_kwargs={"smoothing": 0.1}, verbose=False, **arguments)
    result = task(*batch)
    logits, auxiliary = twin(batch[0])
    main, beside = smoothed(logits, batch[1]), smoothed(auxiliary, batch[1])
    # The paper's weight is the default.
    expected = main + (0.4 if weight is None else weight) * beside
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(result["loss"], expected, **close)
    torch.testing.assert_close(result["main_loss"], main.detach(), **close)
    torch.testing.assert_close(result["auxiliary_loss"], beside.detach(), **close)
    assert torch.equal(result["output"], logits)
    assert not result["main_loss"].requires_grad and not result["auxiliary_loss"].requires_grad
    result["loss"].backward()
    expected.backward()
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_a_criterion_of_the_user(model, batch):
    task = AuxiliaryClassificationTask(model, lambda logits, target: logits.square().mean(), 0.5, verbose=False)
    logits, auxiliary = copy.deepcopy(model)(batch[0])
    expected = logits.square().mean() + 0.5 * auxiliary.square().mean()
    torch.testing.assert_close(task(*batch)["loss"], expected, rtol=1e-12, atol=1e-12)


def test_mixed_images_have_soft_targets(model, batch):
    with torch.random.fork_rng(devices=[]):
        x, target = Mixup(mixup_alpha=0.8, label_smoothing=0.1, num_classes=CLASSES)(*batch)
    assert target.shape == (4, CLASSES) and target.sum(1).tolist() == pytest.approx([1.0] * 4)
    task = AuxiliaryClassificationTask(model, criterion_kwargs={"soft_targets": True}, verbose=False)
    logits, auxiliary = copy.deepcopy(model)(x)
    main, beside = (-(target * output.log_softmax(1)).sum(1).mean() for output in (logits, auxiliary))
    torch.testing.assert_close(task(x, target)["loss"], main + 0.4 * beside)


def test_no_auxiliary_logits_are_an_error(model, small, batch):
    message = r"no auxiliary logits: .*auxiliary=True.*model\.train\(\)"
    plain = small(num_cells=2, dtype=torch.float64).train()
    with pytest.raises(ValueError, match=message):
        AuxiliaryClassificationTask(plain, verbose=False)(*batch)
    task = AuxiliaryClassificationTask(model, verbose=False)
    model.eval()
    with pytest.raises(ValueError, match=message):
        task(*batch)
    task.train()
    assert task(*batch)["loss"].isfinite()


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_bad_weights_are_refused(model, weight):
    with pytest.raises(ValueError, match="auxiliary_weight must be at least 0 and finite, got"):
        AuxiliaryClassificationTask(model, auxiliary_weight=weight)


def test_compiling(model, batch):
    expected = AuxiliaryClassificationTask(copy.deepcopy(model), verbose=False)(*batch)["loss"]
    task = AuxiliaryClassificationTask(model, verbose=False)
    compiled = task.compile(backend="eager")
    assert task.get_eval_model() is compiled
    torch.testing.assert_close(task(*batch)["loss"], expected)
    # Checkpoints have the network's own names.
    assert task.get_checkpoint_state()["state_dict"].keys() == model.state_dict().keys()


def test_averaging_and_resuming_are_timms(model, batch, tmp_path):
    task = AuxiliaryClassificationTask(model, verbose=False)
    assert isinstance(task, ClassificationTask)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1, momentum=0.9)
    task.setup_ema(decay=0.5)
    task(*batch)["loss"].backward()
    optimizer.step()
    task.update_ema()
    saver = CheckpointSaver(
        model, optimizer, argparse.Namespace(model="genas_cell"), task=task, checkpoint_dir=tmp_path
    )
    saver.save_checkpoint(2)
    twin = copy.deepcopy(model)
    twin.reset_classifier(CLASSES)
    resumed = AuxiliaryClassificationTask(twin, verbose=False)
    resumed.setup_ema(decay=0.5)
    steps = torch.optim.SGD(twin.parameters(), lr=0.7)
    assert resume_task_checkpoint(resumed, tmp_path / "last.pth.tar", steps, log_info=False) == 3
    load_task_ema_checkpoint(resumed, tmp_path / "last.pth.tar")
    for ema in (False, True):
        one, other = (each.get_checkpoint_state(ema=ema) for each in (task, resumed))
        assert one.keys() == other.keys() == {"state_dict_ema" if ema else "state_dict"}
        for name, value in next(iter(one.values())).items():
            assert torch.equal(value, next(iter(other.values()))[name]), name
    assert steps.param_groups[0]["lr"] == 0.1
    with torch.no_grad():
        evaluated = task.get_eval_model().eval()(batch[0])
    assert evaluated.shape == (4, CLASSES)


def test_weights_of_timms_own_task_fit(model, small, batch):
    # The same names with and without the auxiliary loss, so that either run can go on from the other's file.
    state = AuxiliaryClassificationTask(model, verbose=False).get_checkpoint_state()["state_dict"]
    plain = small(num_cells=2, dtype=torch.float64)
    ClassificationTask(plain, verbose=False).load_checkpoint_state(state)
    assert torch.equal(plain.eval()(batch[0]), model.eval()(batch[0]))


def test_the_task_moves_with_its_type(model, batch):
    task = AuxiliaryClassificationTask(model, verbose=False).to(torch.float32)
    assert task.dtype == torch.float32
    assert task(batch[0].float(), batch[1])["loss"].dtype == torch.float32
    assert timm.utils.unwrap_model(task.get_trainable_module()) is model
