"""
Exercise 2: causal attention. Each position averages what it and the earlier positions pass on.

    q, k, v  (B, H, T, D) float: B rows, H heads, T positions, D numbers each

The score of position t for position s is the dot product of q[t] and k[s], divided by the square
root of D. Position t sees the positions 0 to t, itself included. The softmax over their scores
gives the weights of its average of v[0] to v[t]. Return the averages, (B, H, T, D). Don't call
torch's own attention.

An example: D = 4, q[1] = [2, 0, 0, 0], k[0] = [0, 0, 0, 0], k[1] = [ln 3, 0, 0, 0]. Position 1
has the scores 0 and 2 * ln 3 / 2 = ln 3, so its weights are 1/4 and 3/4. If v[0] is all 0 and v[1]
is all 8, its average is all 6. Position 0 sees only itself, so its average is v[0], all 0.

In the project: attend() in model.py.
"""

import math

import torch


def attend(q, k, v):
    raise NotImplementedError("your turn")


def test_the_worked_example():
    q, k, v = torch.zeros(3, 1, 1, 2, 4)
    q[..., 0], k[0, 0, 1, 0], v[0, 0, 1] = torch.tensor([5.0, 2.0]), math.log(3), 8.0
    first, second = attend(q, k, v)[0, 0, :, 0].tolist()
    assert abs(first) < 1e-5, f"position 0 gets {first:.2f}, but it should see only itself: 0"
    assert abs(second - 6) < 1e-4, f"position 1 gets {second:.2f}, but it should get 6"


def test_no_position_sees_the_future():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 5, 4)
    before = attend(q, k, v)
    k[:, :, 3:], v[:, :, 3:] = 1.0, 9.0  # another future
    same = torch.isclose(attend(q, k, v), before, atol=1e-6).all(dim=-1).all(dim=1).all(dim=0)
    assert same[:3].all(), "positions 0 to 2 change when you change positions 3 and 4"
    assert not same[3:].any(), "positions 3 and 4 ignore what changed there"


def test_without_preferences_it_is_the_mean_up_to_here():
    v = torch.tensor([0.0, 2.0, 10.0]).view(1, 1, 3, 1)
    y = attend(torch.zeros(1, 1, 3, 1), torch.ones(1, 1, 3, 1), v).flatten()  # all scores are 0
    should = "[0, 1, 4]: the means of the values up to each position, itself included"
    assert torch.allclose(y, torch.tensor([0.0, 1.0, 4.0])), f"{y.tolist()} should be {should}"


def test_large_scores():
    q = torch.tensor([1.0, 1e5]).view(1, 1, 2, 1)
    y = attend(q, q, q).flatten().tolist()
    assert y == [1.0, 1e5], f"the averages are {y}, but should be [1, 1e5]: does exp() overflow?"
