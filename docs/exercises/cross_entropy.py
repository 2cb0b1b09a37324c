"""
Exercise 1: cross-entropy. How surprised was the model by each target, on average?

    logits   (N, V) float: row i has a score for each of the V tokens
    targets  (N,) int64: row i predicts targets[i]; a target of -100 doesn't count

Take the softmax of each row. The loss of a row is -ln p, where p is the probability of its target.
Return the mean over the rows that count, a scalar tensor. If no row counts, return a 0 that still
depends on the logits, so backward() works. Logits of 10,000 must work. Don't call torch's own
cross-entropy.

An example: logits [[0, 0], [ln 3, 0], [5, 5]] and targets [1, 0, -100]. The first target has
p = 1/2, so it costs 0.693 nats. The second has p = 3/4 and costs 0.288. The third doesn't count.
The loss is (0.693 + 0.288) / 2 = 0.490.

In the project: cross_entropy() in model.py.
"""

import math

import torch


def cross_entropy(logits, targets):
    raise NotImplementedError("your turn")


def test_the_worked_example():
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [5.0, 5.0]])
    loss = cross_entropy(logits, torch.tensor([1, 0, -100])).item()
    assert abs(loss - 0.4904) < 1e-3, f"the loss is {loss:.4f}, but it should be 0.4904"


def test_rows_that_do_not_count_change_nothing():
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 128, requires_grad=True), torch.randint(128, (6,))
    targets[::2] = -100  # with V over 100, logits[i, -100] is a number, too
    loss = cross_entropy(logits, targets)
    without = cross_entropy(logits[1::2], targets[1::2])
    assert torch.allclose(loss, without), f"{loss:.4f} with masked rows, {without:.4f} without"
    loss.backward()
    assert (logits.grad[::2] == 0).all(), "a row with target -100 gets a gradient"
    assert (logits.grad[1::2] != 0).all(), "a row that counts gets no gradient"


def test_logits_of_ten_thousand():
    logits = torch.tensor([[1e4, 0.0], [0.0, -1e4]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([1, 1]))
    assert loss == 1e4, f"the loss is {loss}, not 10,000: does exp() overflow, or p become 0?"
    loss.backward()
    assert logits.grad.isfinite().all(), f"the gradient isn't finite: {logits.grad}"


def test_no_row_counts():
    logits = torch.zeros(3, 5, requires_grad=True)
    loss = cross_entropy(logits, torch.full((3,), -100))
    loss.backward()  # a step in which nothing counts must work, too
    assert loss == 0, f"the loss is {loss}, not 0: do you divide by a count of 0?"
