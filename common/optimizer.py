"""
The optimizers: Muon for the matrices inside the blocks, AdamW for the tables of tokens.

Muon averages recent gradients, then makes all singular values of the average nearly equal. So a
step goes about equally far in every direction, not mostly in the one or two strongest.
"""

import torch

from common.device import precision


def orthogonalize(G):
    """Bring all singular values of each matrix close to 1, and keep its singular vectors.

    G: (n, rows, cols), any scale. Returns the same shape. This needn't be exact, so it runs in
    bfloat16 where the hardware is fast at it. Five Newton-Schulz steps, with the coefficients of
    Jordan et al.: they pull any singular value between 0.01 and 1 to between 0.68 and 1.13.
    """
    if G.size(1) > G.size(2):
        return orthogonalize(G.mT).mT
    X = (G / (G.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(precision(G.device))
    for _ in range(5):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)  # -4.7750 A + 2.0315 A A
        X = torch.baddbmm(X, B, X, beta=3.4445)  # 3.4445 X + B X
    return X


class Muon(torch.optim.Optimizer):
    """MomentUm Orthogonalized by Newton-Schulz (kellerjordan.github.io/posts/muon, 2024).

    The same update as torch.optim.Muon. We write it out because torch's always uses bfloat16,
    about 100 times slower than float32 on a processor without bfloat16 instructions. Ours also
    sends all matrices of one shape through the iteration together. The momentum is 0.9, not the
    usual 0.95: runs of a few hundred steps gain from forgetting sooner.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        """Update every parameter, (rows, cols) each, from its gradient."""
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                updates = []
                for p in params:
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                    momentum = self.state[p]["momentum"]
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(momentum, group["momentum"]))  # Nesterov
                updates = orthogonalize(torch.stack(updates))
                scale = max(1, shape[0] / shape[1]) ** 0.5  # taller matrices take larger steps
                for p, update in zip(params, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * scale)


def make_optimizers(model, config):
    """[Muon for the blocks, AdamW for the tables]; each group remembers its "peak_lr"."""
    muon = Muon(model.blocks.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    tables = [model.embed.weight, model.values.weight, model.pair_values.weight]
    adamw = torch.optim.AdamW(
        tables, lr=config.embed_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    for group in muon.param_groups + adamw.param_groups:
        group["peak_lr"] = group["lr"]
    return [muon, adamw]
