"""
Exercise 6: the DPO loss. Of two answers, prefer the chosen one, compared with where you started.

    chosen, rejected                (B,) float: ln p of both answers, by the model in training
    chosen_before, rejected_before  (B,) float: ln p of both answers, by the model it started from
    beta                            a number above 0

Each ln p is a sum over the tokens of an answer. Its gain is ln p now minus ln p before. The margin
of a pair is beta * (gain of the chosen answer - gain of the rejected one). Its loss is
-ln sigmoid(margin). Return the mean loss over the pairs, a scalar tensor. Margins of 1,000 must
work.

An example: beta is 0.5. The chosen answer went from -10 to -8, the rejected one from -12 to -13.
The gains are 2 and -1, so the margin is 0.5 * (2 + 1) = 1.5. The loss is ln(1 + e^-1.5) = 0.201.
Before the first step nothing has gained yet. So the loss is ln 2 = 0.693, whatever beta is.

In the project: Chooser.preference() in dpo.py.
"""

import math

import torch


def dpo_loss(chosen, rejected, chosen_before, rejected_before, beta):
    raise NotImplementedError("your turn")


def loss_of(chosen, rejected, chosen_before, rejected_before, beta=0.5):
    numbers = (chosen, rejected, chosen_before, rejected_before)
    return dpo_loss(*(torch.tensor(x) for x in numbers), beta).item()


def test_the_worked_example():
    loss = loss_of([-8.0], [-13.0], [-10.0], [-12.0])
    assert abs(loss - 0.2014) < 1e-3, f"the loss is {loss:.4f}, but should be 0.2014"


def test_it_starts_at_ln_2():
    loss = loss_of([-8.0, -9.0], [-30.0, -2.0], [-8.0, -9.0], [-30.0, -2.0])
    assert abs(loss - math.log(2)) < 1e-5, f"the loss starts at {loss:.4f}, not at ln 2"


def test_each_pair_has_its_own_loss():
    loss = loss_of([-10.0, -50.0], [-10.0, -10.0], [-50.0, -10.0], [-10.0, -10.0])
    assert abs(loss - 10) < 1e-3, f"margins of 20 and -20 give {loss:.4f}, not (0 + 20) / 2 = 10"


def test_margins_of_a_thousand():
    loss = loss_of([0.0, -2000.0], [-2000.0, 0.0], [-1.0, -1.0], [-1.0, -1.0])
    assert abs(loss - 500) < 1e-3, f"margins of 1000 and -1000 give {loss}, not 500"


def test_it_pushes_one_answer_up_and_the_other_down():
    ln_p = torch.zeros(4, 1, requires_grad=True)
    dpo_loss(*ln_p, beta=0.5).backward()
    slopes = ln_p.grad[:2, 0].tolist()
    assert slopes == [-0.25, 0.25], f"the slopes for chosen and rejected are {slopes}, not -+1/4"
