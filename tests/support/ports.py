"""GPT-2 in PyTorch as other people write it: nanoGPT's modules, and a port with names and parts of its own."""

import math
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(0.1)
        self.n_head = config.n_head

    def forward(self, x):
        b, t, n = x.shape
        q, k, v = self.c_attn(x).split(n, dim=2)
        q, k, v = (y.view(b, t, self.n_head, n // self.n_head).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(b, t, n)))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The modules of nanoGPT. As there, the logits are those of the last position alone."""

    def __init__(self, config, bias=True):
        super().__init__()
        self.config = SimpleNamespace(
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            block_size=config.n_ctx,
            vocab_size=config.n_vocab,
            dropout=0.1,
            bias=bias,
        )
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.n_vocab, config.n_embd),
                "wpe": nn.Embedding(config.n_ctx, config.n_embd),
                "drop": nn.Dropout(0.1),
                "h": nn.ModuleList([Block(self.config) for _ in range(config.n_layer)]),
                "ln_f": nn.LayerNorm(config.n_embd, bias=bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.n_vocab, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, ids):
        t = self.transformer
        x = t.drop(t.wte(ids) + t.wpe(torch.arange(ids.shape[1])))
        for block in t.h:
            x = block(x)
        return self.lm_head(t.ln_f(x)[:, [-1], :]), None


class Layer(nn.Module):
    """A layer with separate projections, names of its own, and a residual stream that is written in place."""

    def __init__(self, n, n_head, hidden):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(n), nn.LayerNorm(n)
        self.query, self.key, self.value, self.out = (nn.Linear(n, n) for _ in range(4))
        self.up, self.act, self.down = nn.Linear(n, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, n)
        self.n_head = n_head

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.n_head, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        mask = torch.ones(scores.shape[-2:]).tril() == 0
        x += self.out((scores.masked_fill(mask, -math.inf).softmax(-1) @ v).transpose(1, 2).flatten(2))
        x += self.down(self.act(self.up(self.norm2(x))))
        return x


class Port(nn.Module):
    """A port with names of its own, and a head that is not tied."""

    def __init__(self, config):
        super().__init__()
        self.tokens = nn.Embedding(config.n_vocab, config.n_embd)
        self.positions = nn.Embedding(config.n_ctx, config.n_embd)
        self.layers = nn.ModuleList(
            [Layer(config.n_embd, config.n_head, config.n_hidden) for _ in range(config.n_layer)]
        )
        self.norm = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.n_vocab, bias=False)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


PORT_NAMES = {
    "tokens": "wte",
    "positions": "wpe",
    "layers.{}.norm1": "h{}/ln_1",
    "layers.{}.query": "h{}/attn/q",
    "layers.{}.key": "h{}/attn/k",
    "layers.{}.value": "h{}/attn/v",
    "layers.{}.out": "h{}/attn/c_proj",
    "layers.{}.norm2": "h{}/ln_2",
    "layers.{}.up": "h{}/mlp/c_fc",
    "layers.{}.act": "h{}/mlp/gelu",
    "layers.{}.down": "h{}/mlp/c_proj",
    "norm": "ln_f",
    "head": "logits",
}


def fill(model, weights, names=None):
    """Write parameters by our paths into a port: a GPT, or a Port with `names` PORT_NAMES."""
    with torch.no_grad():
        for path, a in weights.items():
            x, (scope, _, leaf) = torch.from_numpy(a), path.rpartition("/")
            if path in ("wte", "wpe", "lm_head"):
                theirs = {"wte": "transformer.wte", "wpe": "transformer.wpe", "lm_head": "lm_head"}
                if names:
                    theirs = {"wte": "tokens", "wpe": "positions", "lm_head": "head"}
                model.get_submodule(theirs[path]).weight.copy_(x)
                continue
            layer, _, name = scope.partition("/") if "/" in scope else ("", "", scope)
            if names and name == "attn/c_attn":
                for part, y in zip(("query", "key", "value"), x.chunk(3, dim=-1), strict=True):
                    module = model.layers[int(layer[1:])].get_submodule(part)
                    (module.bias if leaf == "b" else module.weight).copy_(y.T if y.ndim == 2 else y)
                continue
            if names:
                ours = scope.replace(layer, "h{}", 1) if layer else scope
                [theirs] = [theirs for theirs, each in names.items() if each == ours]
                module = model.get_submodule(theirs.replace("{}", layer[1:]))
            else:
                dotted = f"h.{layer[1:]}.{name.replace('/', '.')}" if layer else name
                module = model.get_submodule(f"transformer.{dotted}")
            target = module.bias if leaf == "b" else module.weight
            if target is not None:
                target.copy_(x.T if x.ndim == 2 else x)
    return model.eval()
