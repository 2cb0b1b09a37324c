"""One step of the real training loop, and the gradients that its optimizers see."""

import pytest
import torch

import pretrain
from common import run
from pretrain import PretrainConfig


class Watcher(torch.optim.Optimizer):
    """Notes the gradients and changes no weight."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.0, "peak_lr": 0.0})

    def step(self):
        params = [p for group in self.param_groups for p in group["params"]]
        self.gradients = [p.grad.clone() for p in params]


def one_step(model, batch, folder, micro_batch_size=0):
    """Let train() do one step, in float32, and write its log to the folder.

    Returns the loss and a list of gradients, one for each parameter. Of several processes, only the
    first knows the loss; the others get None.
    """
    config = PretrainConfig(out=str(folder), max_steps=1, micro_batch_size=micro_batch_size)
    watcher = Watcher(model.parameters())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "make_optimizers", lambda model, config: [watcher])
        patch.setattr(run, "precision", lambda device: torch.float32)
        log = pretrain.train(model, lambda step: batch, config, run.Run(config, "log", "", {}))
    return log.get("loss"), watcher.gradients


def gradients(model, batch):
    """The expected gradients: those of the mean loss over the whole batch."""
    model.zero_grad()
    model(**batch)[1].backward()
    return [p.grad.clone() for p in model.parameters()]


def close(ours, theirs):
    """Whether two lists of tensors agree, each to a hundred-thousandth of its size."""
    pairs = zip(ours, theirs, strict=True)
    return all((a - b).norm() <= 1e-5 * b.norm() for a, b in pairs)
