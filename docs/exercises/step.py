"""
Exercise 5: one training step in micro-batches, because the whole batch doesn't fit into memory.

    model      model(**batch) returns (logits, loss): a row of logits for each target, (N, V), and
               the mean loss of these N targets, a scalar tensor
    optimizer  a torch optimizer for the model's parameters
    batches    [{"input_ids": (B, T), "labels": (B, T)}, ...], int64; each has its own N

Make the step that one big batch would make: one update, by the gradient of the sum over all
targets divided by their number. Return that loss. Don't let old gradients leak into a step. If
nothing counts, the loss is 0, and no weight becomes NaN.

An example: one target has a loss of 32. Three targets in another micro-batch have a mean of 0. The
loss of the step is (1 * 32 + 3 * 0) / (1 + 3) = 8. The mean of the two means would be 16.

In the project: train() in pretrain.py.
"""

import torch


def training_step(model, optimizer, batches):
    raise NotImplementedError("your turn")


class OneWeight(torch.nn.Module):
    def forward(self, input_ids, labels):
        targets = labels[:, 1:][labels[:, 1:] != -100]  # nothing predicts the first label
        losses = (self.w - targets) ** 2 / 2  # so the best w is the mean target
        return self.w.expand(len(targets), 1), losses.sum() / max(1, len(targets))


def steps(n_steps, *rows):
    model = OneWeight()
    model.w = torch.nn.Parameter(torch.zeros(()))
    rows = [torch.tensor([row]) for row in rows]
    batches = [{"input_ids": row, "labels": row} for row in rows]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)  # takes w to the mean in one step
    losses = [float(training_step(model, optimizer, batches)) for _ in range(n_steps)]
    return losses[0], model.w.item()


def test_the_loss_is_a_sum_over_a_count():
    loss, _ = steps(1, [-100, -100, 8], [5, 0, 0, 0])
    assert abs(loss - 8) < 1e-5, f"the loss is {loss}, but should be (32 + 0 + 0 + 0) / 4 = 8"


def test_the_gradient_is_one_too():
    _, w = steps(1, [-100, -100, 8], [5, 0, 0, 0])
    assert abs(w - 2) < 1e-5, f"w becomes {w}, but should become (8 + 0 + 0 + 0) / 4 = 2"


def test_the_next_step_has_no_old_gradients():
    _, w = steps(2, [-100, -100, 8], [5, 0, 0, 0])
    assert abs(w - 2) < 1e-5, f"after another step w is {w}, but should still be 2"


def test_nothing_counts():
    loss, w = steps(1, [-100, -100, -100], [7, -100, -100, -100])
    assert loss == w == 0, f"the loss is {loss} and w is {w}, but both should be 0"
