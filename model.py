"""
A GPT in one file: the network that both stages train, its loss, and generation.

Read it from top to bottom, in the order in which data meets it: token ids go through an embedding, then through
n_layer blocks (attention, then a small MLP, each added onto a running sum called the residual stream), then through
a linear layer that gives one score, a "logit", for every entry of the vocabulary.

    model = GPT(GPTConfig(block_size=128, vocab_size=1024, n_layer=4, n_head=4, n_embd=192))
    logits, loss = model(input_ids, labels=input_ids)         # training: labels may hold -100, "do not look here"
    rows = model.generate([[1, 2, 3]], max_new_tokens=20)     # inference

Where the ideas come from: the transformer (Vaswani et al. 2017, arXiv 1706.03762), the GPT-2 arrangement with the
normalisation before each layer (Radford et al. 2019), rotary positions (Su et al. 2021, arXiv 2104.09864), normalised
queries and keys (Henry et al. 2020, arXiv 2010.04245), the squared ReLU (So et al. 2021, arXiv 2109.08668).
Letters in the comments on shapes: B rows of a batch, T positions, C = n_embd, H heads of D = C / H numbers,
V = vocab_size, N positions that are scored.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

EMBED_STD = 0.005  # small, so that a fresh model's logits are near 0; as an input, a row is normalised anyway
IGNORE_INDEX = -100  # a label with this value is not scored; the field's convention


@dataclass
class GPTConfig:
    block_size: int = 128  # the longest context, in tokens
    vocab_size: int = 1024
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 192
    dropout: float = 0.0


def norm(x):
    """Scale each vector of the last dimension of x, (..., C), to mean 0 and variance 1 (Ba et al. 2016, arXiv 1607.06450).

    Without learned scales: the matrices that follow can learn them. (RMS normalisation would do as well, but
    torch's runs the slower of the two on a CPU.)
    """
    return F.layer_norm(x, (x.size(-1),))


def rotate(x, cos, sin):
    """Rotary positions: turn each pair of a head's numbers, i and i + D/2, by an angle of position * frequency_i.

    That is (a, b) -> (a cos - b sin, b cos + a sin). After it, the product of a query and a key depends on their distance alone.
    x: (B, H, T, D); cos and sin: (T, D), or (B, 1, T, D) where the rows of a batch stand at different positions; their halves are
    (cos, cos) and (-sin, sin).
    """
    partner = x.roll(x.size(-1) // 2, dims=-1)
    return x * cos.type_as(x) + partner * sin.type_as(x)


def attend(q, k, v, mask, dropout):
    """Each query takes the average of the values, weighted by how well their keys match it.

    q: (B, H, T, D); k, v: (B, H, S, D); mask: bool, (B, 1, T, S), True where a query may look; or None, where S is T:
    then everybody looks at itself and back. Returns (B, H, T, D).
    """
    if q.is_cuda:  # (without a mask, torch can choose the fastest of its fused kernels)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout)
    # The same thing written out, for all other devices. On a CPU, at these sizes, it trains as fast as torch's fused kernel, and faster in bfloat16.
    if mask is None:
        mask = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool, device=q.device).tril()
    unseen = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, float("-inf"))  # softmax turns -inf into 0
    scores = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1) + unseen  # (B, H, T, S)
    return F.dropout(scores.softmax(dim=-1), dropout) @ v


class Attention(nn.Module):
    """Causal self-attention with n_head heads: the only place where positions exchange information."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.query = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.key = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.value = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, rotary, mask, cache=None):
        """x: (B, T, C); rotary: (cos, sin), see rotate(); mask: see attend(). Returns (B, T, C)."""
        B, T, C = x.shape
        # Three matrices, as the optimizer treats each by itself; joined, as one product is faster than three.
        weight = torch.cat((self.query.weight, self.key.weight, self.value.weight))  # (3 C, C)
        qkv = F.linear(x, weight).view(B, T, 3 * self.n_head, C // self.n_head).transpose(1, 2)  # (B, 3 H, T, D)
        qk, v = qkv.split([2 * self.n_head, self.n_head], dim=1)
        q, k = rotate(norm(qk), *rotary).chunk(2, dim=1)  # normalised, no score can run away
        if cache is not None:
            k, v = cache.append(k, v)  # the keys and values of all earlier positions come along
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Two matrices with a squared ReLU between them, at every position alone: where most facts come to be stored."""

    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        """x: (B, T, C). Returns (B, T, C)."""
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    """One layer: what attention gathers, then what the MLP makes of it, each added onto the residual stream x, (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotary, mask, cache=None):
        x = x + self.dropout(self.attention(norm(x), rotary, mask, cache))
        x = x + self.dropout(self.mlp(norm(x)))
        return x


class Cache:
    """The keys and values that one attention layer has computed so far, so that generating a token costs one position."""

    def __init__(self, k, v):
        """k, v: (B, H, room, D) each, to be written into: room is for how many positions."""
        self.k, self.v, self.past = k, v, 0  # past: how many positions there are

    def append(self, k, v):
        """k, v: (B, H, T, D), the newest positions. Returns all of them so far, (B, H, S, D)."""
        start, self.past = self.past, self.past + k.size(2)
        self.k[:, :, start : self.past], self.v[:, :, start : self.past] = k, v
        return self.k[:, :, : self.past], self.v[:, :, : self.past]

    def keep(self, rows):
        """Only these rows of the batch; rows: a list of int."""
        self.k, self.v = self.k[rows], self.v[rows]


def slices(logits):
    """The rows of logits, (N, V), in slices that a processor's cache can hold while they are worked on.

    (On a GPU in larger ones, as every step of the work takes a while to begin there.)
    """
    size = max(16, (2**19 if logits.device.type == "cpu" else 2**26) // logits.size(1))
    return [slice(i, i + size) for i in range(0, len(logits), size)]


class CrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[target] for every row, and its derivative, softmax(logits) - onehot(target).

    logits: (N, V); targets: (N,) int64, each from 0 to V - 1. Gives (N,) float32.
    Works through a slice of rows at a time, so that only a slice is ever held in float32. The derivative is worked out on the
    way forward, while the softmax is at hand: to come back for it later would cost as much again. It goes backward once.
    """

    @staticmethod
    def forward(ctx, logits, targets):
        target = targets[:, None]  # (N, 1), as the three below
        largest, likeliest = torch.empty(2, len(targets), 1, device=logits.device)
        minus_one = torch.full_like(largest, -1.0)
        grad = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        in_place = grad is not None and grad.dtype == torch.float32  # the softmax, where the derivative will stand: a copy less
        for rows in slices(logits):
            z = logits[rows].float()
            p = torch.softmax(z, dim=-1, out=grad[rows] if in_place else None)
            largest[rows], likeliest[rows] = z.amax(dim=-1, keepdim=True), p.amax(dim=-1, keepdim=True)
            if grad is not None:
                grad[rows] = p.scatter_add_(1, target[rows], minus_one[rows])  # softmax, minus one at the target
        ctx.save_for_backward(grad)
        # -log p[target] = max z - z[target] - log(max p). (The target's own p may round to 0; the largest never does.
        # And the difference of logits first: large ones would swallow the logarithm.)
        return (largest - logits.gather(1, target).float() - likeliest.log()).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses):
        (grad,) = ctx.saved_tensors
        for rows in slices(grad):  # in place: of a large vocabulary, this is the largest thing there is
            grad[rows] *= grad_losses[rows, None]  # (and of bfloat16, torch makes a float32 copy for this product)
        return grad, None


def cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="mean"):
    """How surprised the model was, in nats: the negative log of the probability it gave to what came next.

    logits: (N, V), any float dtype; targets: (N,) int64, already aligned (row i is scored against targets[i]).
    Rows whose target is ignore_index count for nothing, in the loss and in the gradient.
    reduction: "mean" over the rows that count, "sum", or "none" for (N,) losses. Returns float32.
    With no row that counts, the mean is 0 and so is the gradient (0/0 would turn the whole run to NaN).
    Raises ValueError for another reduction or for shapes that do not fit.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"logits must be (N, V) and targets (N,), not {tuple(logits.shape)} and {tuple(targets.shape)}")
    counts = targets != ignore_index
    losses = CrossEntropy.apply(logits, targets.where(counts, 0)).where(counts, 0.0)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if reduction == "mean":
        return losses.sum() / counts.sum().clamp(min=1)
    raise ValueError(f'reduction must be "mean", "sum" or "none", not {reduction!r}')


class GPT(nn.Module):
    def __init__(self, config):
        """Raises ValueError if n_embd / n_head is not an even whole number or a size is not positive."""
        super().__init__()
        if min(config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd) < 1:
            raise ValueError("block_size, vocab_size, n_layer, n_head and n_embd must be at least 1")
        if config.n_embd % (2 * config.n_head):
            raise ValueError(f"n_embd ({config.n_embd}) must be a multiple of twice n_head ({config.n_head})")
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.head.weight = self.embed.weight  # one table for reading and writing a token: to copy a name is then easy to learn
        self.dropout = nn.Dropout(config.dropout)

        pairs = config.n_embd // config.n_head // 2
        frequencies = 10000.0 ** (-torch.arange(pairs) / pairs)  # radians per position, fast to slow
        angles = torch.arange(config.block_size)[:, None] * frequencies  # (block_size, D/2)
        self.register_buffer("cos", torch.cat((angles.cos(), angles.cos()), dim=-1), persistent=False)  # (block_size, D)
        self.register_buffer("sin", torch.cat((-angles.sin(), angles.sin()), dim=-1), persistent=False)

        # Every block begins as the identity (its last matrix is zero) and every logit near 0: the first loss is about ln(V).
        for name, p in self.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):
                nn.init.zeros_(p)
            else:
                nn.init.normal_(p, std=EMBED_STD if name == "embed.weight" else config.n_embd**-0.5)

    def hidden(self, input_ids, padding=None, caches=None):
        """The residual stream after the last block. input_ids: (B, T) int64. Returns (B, T, C).

        For generation, both or neither: padding, (B,) int64, says how many positions at the left of each row are not text;
        caches, one per layer, hold what came before input_ids.
        """
        B, T = input_ids.shape
        past = caches[0].past if caches else 0
        S = past + T
        if S > self.config.block_size:
            raise ValueError(f"{S} positions do not fit a block_size of {self.config.block_size}")
        mask, rotary = None, (self.cos[:S], self.sin[:S])  # (T, D) each
        if padding is not None:
            t = torch.arange(past, S, device=input_ids.device)  # (T,), the positions that look
            s = torch.arange(S, device=input_ids.device)  # (S,), the positions looked at
            looks_back = (s <= t[:, None]) & (s >= padding[:, None, None])  # (B, T, S): nobody looks ahead, or at padding
            mask = (looks_back | (s == t[:, None]))[:, None]  # (B, 1, T, S); a pad sees itself, for a finite softmax
            positions = (t - padding[:, None]).clamp(min=0)  # (B, T): counted from a row's own first token
            rotary = self.cos[positions][:, None], self.sin[positions][:, None]  # (B, 1, T, D) each

        x = self.dropout(norm(self.embed(input_ids)))  # (B, T, C)
        for i, block in enumerate(self.blocks):
            x = block(x, rotary, mask, caches[i] if caches else None)
        return norm(x)

    def forward(self, input_ids, labels=None):
        """Predict the next token at every position.

        input_ids: (B, T) int64. labels: (B, T) int64, input_ids with -100 wherever the loss must not look, or None.
        Returns (logits, loss). With labels: logits (N, V), one row for each target that counts, in row-major
        order, and loss, their mean cross-entropy in nats. Without: logits (B, 1, V) of the last position, and None.
        Raises ValueError if T exceeds block_size.
        """
        x = self.hidden(input_ids)
        if labels is None:
            return self.head(x[:, -1:]), None
        x, targets = x[:, :-1].flatten(0, 1), labels[:, 1:].flatten()  # The shift, here and only here: t is scored against label t + 1.
        scored = (targets != IGNORE_INDEX).nonzero().squeeze(1)  # (N,), the places of those that count
        logits = self.head(x.index_select(0, scored))  # (N, V): where nothing is scored, nothing is projected
        return logits, cross_entropy(logits, targets[scored])

    def prefill(self, contexts, max_new_tokens):
        """Put contexts into new caches, aligned at their right ends, with room for max_new_tokens more (but no more than block_size in all).

        contexts: lists of token ids, the shortest first. A few rows are worked on at a time: of similar length, they need
        little padding, and the memory for that does not grow with their number.
        Returns the residual stream of the last positions, (B, C), and padding and caches, see hidden().
        """
        device, B, longest = self.embed.weight.device, len(contexts), len(contexts[-1])
        room, n_head = min(self.config.block_size, longest + max_new_tokens), self.config.n_head
        padding = torch.tensor([longest - len(context) for context in contexts], device=device)
        caches = [Cache(*self.embed.weight.new_zeros(2, B, n_head, room, self.config.n_embd // n_head)) for _ in self.blocks]
        x = []
        for i in range(0, B, 16):  # (so few that little is padding, so many that the processor is busy)
            rows = slice(i, i + 16)
            width = len(contexts[rows][-1])
            start = longest - width  # what is left of it is never written, and must be zeros: NaN would get through the mask
            input_ids = torch.tensor([[0] * (width - len(context)) + context for context in contexts[rows]], device=device)
            parts = [Cache(cache.k[rows, :, start:], cache.v[rows, :, start:]) for cache in caches]  # views: what is put into them is in caches
            x.append(self.hidden(input_ids, padding[rows] - start, parts)[:, -1])
        for cache in caches:
            cache.past = longest
        return torch.cat(x), padding, caches

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, temperature=1.0, top_k=None, stop=None, on_token=None):
        """Continue each prompt, all in one batch.

        prompts: lists of token ids, of any lengths but 0. temperature: 0 takes the likeliest token every time;
        otherwise logits are divided by it before sampling, from the top_k likeliest alone if that is given.
        stop: a token id that ends a row (it is the row's last token), or None.
        on_token(row, token) is called for every token as soon as it is there (within a step, rows come in no particular order).
        Returns a list of lists: the new ids of each row, without its prompt.
        When a row outgrows block_size, its last half block is kept and the cache is filled again from it.
        Raises ValueError for an empty prompt, a temperature below 0 or a top_k below 1.
        """
        if any(len(p) == 0 for p in prompts):
            raise ValueError("every prompt needs at least one token")
        if temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"temperature must be at least 0 and top_k at least 1, not {temperature} and {top_k}")
        device, block_size = self.embed.weight.device, self.config.block_size
        was_training = self.training
        self.eval()
        contexts = [list(p) for p in prompts]  # what each row still sees
        new = [[] for _ in prompts]
        active = list(range(len(prompts)))  # the rows that have not stopped
        caches = None
        for _ in range(max_new_tokens):
            if not active:
                break
            for i in active:
                if len(contexts[i]) > block_size:
                    contexts[i] = contexts[i][-max(1, block_size // 2) :]
                    caches = None
            if caches is None or caches[0].past == block_size:
                active.sort(key=lambda i: len(contexts[i]))
                x, padding, caches = self.prefill([contexts[i] for i in active], max_new_tokens)
            else:
                newest = torch.tensor([contexts[i][-1:] for i in active], device=device)
                x = self.hidden(newest, padding, caches)[:, -1]  # (rows, C)
            logits = self.head(x).float()  # (rows, V)
            if temperature < 1e-6:  # (to divide by less would overflow)
                tokens = logits.argmax(dim=-1).tolist()
            else:
                logits = logits / temperature
                if top_k is not None:
                    smallest = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    logits = logits.masked_fill(logits < smallest, float("-inf"))
                tokens = torch.multinomial(logits.softmax(dim=-1), 1).squeeze(1).tolist()
            keep = []
            for row, (i, token) in enumerate(zip(active, tokens)):
                new[i].append(token)
                contexts[i].append(token)
                if on_token:
                    on_token(i, token)
                if token != stop:
                    keep.append(row)
            if len(keep) < len(active):  # rows that have stopped cost nothing more
                active = [active[row] for row in keep]
                padding = padding[keep]
                for cache in caches:
                    cache.keep(keep)
        self.train(was_training)
        return new
