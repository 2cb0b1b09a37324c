"""
A GPT in one file: the network that every stage trains, its loss, and generation.

Token ids become vectors. A stack of blocks adds to those vectors: attention, then an MLP. A
linear layer turns each vector into one score, a logit, for every token in the vocabulary.

    model = GPT(GPTConfig(block_size=128, vocab_size=1024, n_layer=4, n_head=4, n_embd=192))
    logits, loss = model(input_ids, labels=input_ids)         # training
    rows = model.generate([[1, 2, 3]], max_new_tokens=20)     # inference

Ideas: the transformer (arXiv 1706.03762), GPT-2's normalization before each layer (Radford et al.
2019), rotary positions (arXiv 2104.09864), normalized queries and keys (arXiv 2010.04245), value
embeddings (arXiv 2410.17897), squared ReLU (arXiv 2109.08668). In shapes: B rows in a batch, T
positions, S positions that attention sees, C = n_embd, H heads of D = C / H numbers each,
V = vocab_size, N targets (labels that aren't -100).
Only generation passes `padding` and `caches`: skip both on a first reading.
"""

from dataclasses import astuple, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

IGNORE_INDEX = -100  # a label with this value is not a target; PyTorch's default, too
EMBED_STD = 0.005  # small: a fresh model's logits are near 0, and its loss is about ln V
PAIR_ROWS = 32768  # rows in the table for pairs of tokens; there are more pairs, so they share rows


@dataclass
class GPTConfig:
    block_size: int = 256  # the longest context, in tokens
    vocab_size: int = 4096
    n_layer: int = 6
    n_head: int = 2
    n_embd: int = 128
    dropout: float = 0.0


class CrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[target] for each row, and its derivative with respect to the logits."""

    @staticmethod
    def forward(ctx, logits, targets):
        log_p = F.log_softmax(logits, dim=-1, dtype=torch.float32)  # (N, V)
        ctx.save_for_backward(log_p, targets)
        return -log_p.gather(1, targets[:, None]).squeeze(1)  # (N,)

    @staticmethod
    def backward(ctx, grad_losses):
        log_p, targets = ctx.saved_tensors
        grad = log_p.exp_()  # softmax; in place: this is the step's largest tensor
        grad[torch.arange(len(targets), device=grad.device), targets] -= 1  # minus one-hot
        return grad.mul_(grad_losses[:, None]), None


def cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="mean"):
    """How surprised the model was by each target: -ln of the probability it gave, in nats.

    logits: (N, V), any float dtype. targets: (N,) int64, already aligned: row i predicts
    targets[i]. A row whose target is ignore_index adds nothing to the loss or the gradient.
    reduction: "mean" over the rows that count, "sum", or "none" for (N,) losses. Returns float32.
    If no row counts, the mean is 0, not 0/0. Raises ValueError for wrong shapes or reductions.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"logits must be (N, V), not {logits.shape}; targets must be (N,)")
    counts = targets != ignore_index  # (N,) bool
    losses = CrossEntropy.apply(logits, targets.where(counts, 0)).where(counts, 0.0)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if reduction == "mean":
        return losses.sum() / counts.sum().clamp(min=1)
    raise ValueError(f'reduction must be "mean", "sum" or "none", not {reduction!r}')


def norm(x):
    """Shift and scale each vector of x, (..., C), to mean 0 and variance 1 (arXiv 1607.06450)."""
    return F.layer_norm(x, (x.size(-1),))


def rotate(x, cos, sin):
    """Rotary positions: turn each pair (x[i], x[i + D/2]) by an angle of position * frequency[i].

    Afterwards, the dot product of a query and a key depends only on the distance between them.
    x: (B, H, T, D). cos, sin: (T, D/2).
    """
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.type_as(x), sin.type_as(x)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def attend(q, k, v, mask, dropout):
    """Each query takes an average of the values, weighted by how well their keys match.

    q: (B, H, T, D); k, v: (B, H, S, D); mask: bool, (B, 1, T, S), True where a query may look, or
    None if S = T: then each position sees itself and all before it. Returns (B, H, T, D).
    """
    if q.is_cuda:  # torch's fused kernel does the same, faster
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None)
    if mask is None:
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril()
    scores = (q / q.size(-1) ** 0.5) @ k.transpose(-2, -1)  # (B, H, T, S)
    scores.masked_fill_(~mask, float("-inf"))  # softmax turns -inf into 0
    return F.dropout(scores.softmax(dim=-1), dropout) @ v


class Attention(nn.Module):
    """Causal self-attention: besides pair_values, the only place where positions meet."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        matrices = (nn.Linear(config.n_embd, config.n_embd, bias=False) for _ in range(4))
        self.query, self.key, self.value, self.proj = matrices

    def forward(self, x, extra, rotary, mask, cache=None):
        """x, extra, result: (B, T, C); rotary: (cos, sin) for rotate(); mask: see attend()."""
        B, T, C = x.shape
        # Separate because Muon orthogonalizes each one; concatenated because one matmul is faster.
        weight = torch.cat((self.query.weight, self.key.weight, self.value.weight))  # (3C, C)
        qkv = F.linear(x, weight).view(B, T, 3 * self.n_head, C // self.n_head).transpose(1, 2)
        qk, v = qkv.split([2 * self.n_head, self.n_head], dim=1)
        q, k = rotate(norm(qk), *rotary).chunk(2, dim=1)  # looks for, offers; scores stay small
        v = v + extra.view(B, T, self.n_head, -1).transpose(1, 2)  # passes on; all (B, H, T, D)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, S, D): all earlier positions, then these
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Two matrices with a squared ReLU between them, applied to each position separately."""

    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    """One layer. Attention, then the MLP, each adding to the residual stream x, (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.attention, self.mlp = Attention(config), MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, extra, rotary, mask, cache=None):
        x = x + self.dropout(self.attention(norm(x), extra, rotary, mask, cache))
        return x + self.dropout(self.mlp(norm(x)))


class GPT(nn.Module):
    def __init__(self, config):
        """Raises ValueError for a size below 1, a bad dropout, or heads of odd or unequal size."""
        super().__init__()
        if min(astuple(config)[:-1]) < 1:
            raise ValueError(f"every size must be at least 1, but this is {config}")
        if config.n_embd % (2 * config.n_head):
            raise ValueError(f"n_embd ({config.n_embd}) must be a multiple of 2 * n_head")
        if not 0 <= config.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {config.dropout}")
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        # What every layer adds to its values, looked up for each token and each pair of neighbors:
        # many more parameters, for almost no time. In a pair, token i counts as token alias[i].
        self.values = nn.Embedding(config.vocab_size, config.n_embd)
        self.pair_values = nn.Embedding(PAIR_ROWS, config.n_embd)
        self.register_buffer("alias", torch.arange(config.vocab_size))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.head.weight = self.embed.weight  # one table to read and write tokens, as in GPT-2
        self.dropout = nn.Dropout(config.dropout)

        pairs = config.n_embd // config.n_head // 2
        frequencies = 10000.0 ** (-torch.arange(pairs) / pairs)  # radians per position
        angles = torch.arange(config.block_size)[:, None] * frequencies  # (block_size, D/2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        # Each block starts as the identity: its last matrices are zero. So are the value tables.
        for name, p in self.named_parameters():
            if name.endswith(("values.weight", "proj.weight", "down.weight")):
                nn.init.zeros_(p)
            else:
                nn.init.normal_(p, std=EMBED_STD if name == "embed.weight" else config.n_embd**-0.5)

    def hidden(self, input_ids, padding=None, caches=None, before=0):
        """The residual stream after the last block. input_ids: (B, T) int64. Returns (B, T, C).

        Only generation passes more. padding: (B,) int64, the number of pads at the left of each
        row. caches: one Cache per layer, holding everything before input_ids. before: (B, 1) int64,
        the last id in the caches. An empty cache needs none: then 0, a pad, comes before.
        """
        past = caches[0].length if caches else 0
        S = past + input_ids.size(1)
        if S > self.config.block_size:
            raise ValueError(f"{S} positions don't fit a block_size of {self.config.block_size}")
        rotary, mask = (self.cos[past:S], self.sin[past:S]), None  # pads don't change distances
        if padding is not None:
            t = torch.arange(past, S, device=input_ids.device)[:, None]  # (T, 1): who looks
            s = torch.arange(S, device=input_ids.device)  # (S,): who is looked at
            text = s >= padding[:, None, None]  # (B, 1, S)
            mask = ((s <= t) & text | (s == t))[:, None]  # (B, 1, T, S); a pad sees itself: no NaN

        x = self.dropout(norm(self.embed(input_ids)))  # (B, T, C)
        ids = F.pad(input_ids, (1, 0))  # (B, T + 1): with the id before each row
        ids[:, :1] = before
        ids = self.alias[ids]
        pairs = (36313 * ids[:, 1:] + 27191 * ids[:, :-1]) % PAIR_ROWS  # (B, T): each pair's hash
        extra = self.values(input_ids) + self.pair_values(pairs)  # (B, T, C)
        for i, block in enumerate(self.blocks):
            x = block(x, extra, rotary, mask, caches and caches[i])
        return norm(x)

    def forward(self, input_ids, labels=None):
        """Predict the next token at each position.

        input_ids: (B, T) int64. labels: None, or input_ids with -100 wherever there is no target.
        With labels, returns the logits, (N, V), one row per target in row-major order, and the mean
        cross-entropy in nats. Without labels, returns the logits of the last position, (B, 1, V),
        and None. Raises ValueError if T > block_size.
        """
        x = self.hidden(input_ids)  # (B, T, C)
        if labels is None:
            return self.head(x[:, -1:]), None
        # The shift happens here and only here: position t is scored against label t + 1.
        x, targets = x[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        scored = (targets != IGNORE_INDEX).nonzero().squeeze(1)  # (N,): where the loss looks
        logits = self.head(x.index_select(0, scored))  # (N, V): only those need logits
        return logits, cross_entropy(logits, targets[scored])

    @torch.inference_mode()
    def generate(
        self, prompts, max_new_tokens, temperature=1.0, top_k=None, stop=None, on_token=None
    ):
        """Continue every prompt, all in one batch. Dropout is off.

        prompts: lists of token ids, none empty. temperature: divides the logits before sampling; 0
        always takes the likeliest token. top_k: sample from the k likeliest tokens only. stop: the
        id that ends a row and stays in it, or None. on_token(row, token): called for each token.
        Returns the new ids of each row, a list of lists. A row that outgrows block_size continues
        from its last half block. Raises ValueError for an empty prompt, temperature < 0, top_k < 1.
        """
        if not all(map(len, prompts)) or temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError("needs at least one token per prompt, temperature >= 0 and top_k >= 1")
        device, block_size = self.embed.weight.device, self.config.block_size
        contexts = [list(prompt) for prompt in prompts]  # what each row still sees
        rows, caches = list(range(len(prompts))), None  # the rows that have not stopped
        new = [[] for _ in prompts]
        was_training = self.training
        self.eval()
        try:
            while rows and len(new[rows[0]]) < max_new_tokens:
                if caches is None or caches[0].length == block_size:  # read all of each context
                    half = max(1, block_size // 2)
                    contexts = [c[-half:] if len(c) > block_size else c for c in contexts]
                    input_ids, padding = pad_left([contexts[i] for i in rows], device)
                    before, caches = 0, [Cache() for _ in self.blocks]
                else:  # read the newest tokens; the caches know the rest
                    newest = torch.tensor([contexts[i][-2:] for i in rows], device=device)
                    before, input_ids = newest.chunk(2, dim=1)  # (rows, 1)
                logits = self.head(self.hidden(input_ids, padding, caches, before)[:, -1])
                tokens = sample(logits.float(), temperature, top_k)
                for i, token in zip(rows, tokens, strict=True):
                    new[i].append(token)
                    contexts[i].append(token)
                    if on_token is not None:
                        on_token(i, token)
                going = [n for n, token in enumerate(tokens) if token != stop]
                if len(going) < len(rows):  # rows that have stopped cost nothing more
                    rows = [rows[n] for n in going]
                    padding = padding[going]
                    for cache in caches:
                        cache.keep(going)
        finally:  # even after Ctrl-C
            self.train(was_training)
        return new


class Cache:
    """One layer's keys and values so far, so that we compute each of them only once."""

    length = 0

    def append(self, k, v):
        """Add new keys and values, (B, H, T, D) each. Returns all so far, (B, H, S, D) each."""
        if self.length:
            k, v = torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2)
        self.k, self.v, self.length = k, v, k.size(2)
        return k, v

    def keep(self, rows):
        """Drop all rows of the batch except these, a list of int."""
        self.k, self.v = self.k[rows], self.v[rows]


def pad_left(rows, device):
    """Align lists of ids at their right ends. Returns input_ids, (B, T), and padding, (B,)."""
    longest = max(len(row) for row in rows)
    padding = [longest - len(row) for row in rows]
    input_ids = [[0] * n + row for n, row in zip(padding, rows, strict=True)]
    return torch.tensor(input_ids, device=device), torch.tensor(padding, device=device)


def sample(logits, temperature, top_k):
    """Choose a token for each row of logits, (B, V). Returns a list of B ids."""
    if temperature < 1e-6:  # greedy, and no division by almost 0
        return logits.argmax(dim=-1).tolist()
    logits = logits / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), 1).squeeze(1).tolist()
