"""A model whose slash heads are known: W_q and W_k read one constant residual direction."""

import torch

from .tiny import D_VOCAB, bridge, llama


def planted_model(offsets, layers=1, d_head=32, strength=40.0, n_ctx=256, seed=0):
    """Head h of layer 0 is a slash head at offsets[h] (None: no slash; it reads content).

    Every embedding has the same large first component, so that after the norm it is the cone's
    axis. W_k maps the axis to 1 in every pair's real part; W_q maps it to the same rotated by minus
    the head's offset.
    """
    heads = len(offsets)
    model = llama(seed=seed, layers=layers, heads=heads, kv_heads=heads, d_head=d_head, n_ctx=n_ctx)
    n = d_head // 2
    theta = model.model.rotary_emb.inv_freq.double()
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding.normal_(generator=torch.Generator().manual_seed(seed))
        embedding[:, 0] = 12.0
        attention = model.model.layers[0].self_attn
        q = attention.q_proj.weight.view(heads, d_head, -1)
        k = attention.k_proj.weight.view(heads, d_head, -1)
        # The norm scales the axis to nearly √d_model · 12/√(144 + d_model − 1).
        axis = float((embedding / embedding.square().mean(1, keepdim=True).sqrt())[:, 0].mean())
        amplitude = strength * d_head**0.5 / n / axis**2
        for head, offset in enumerate(offsets):
            if offset is None:
                continue
            q[head], k[head] = 0, 0
            k[head, :n, 0] = 1.0
            q[head, :n, 0] = (amplitude * (theta * offset).cos()).float()
            q[head, n:, 0] = (-amplitude * (theta * offset).sin()).float()
    return bridge(model, "planted")


#: Where the model of known circuits keeps what, in the residual stream.
_AXIS, _TOKEN, _PREVIOUS, _OUTPUT = 0, slice(1, 81), slice(81, 161), slice(161, 241)
_D_HEAD = 128
#: Rotary pairs that tell positions apart, and dimensions whose pairs hardly turn.
_FAST = 16
_STILL = [*range(20, 60), *range(84, 124)]


class Circuit:
    """A Llama without MLPs, with orthonormal tokens, and heads that do what they are told.

    Query heads 0 and 1 share keys and values, and so do 2 and 3. What no head was told to do is
    small and random.
    """

    def __init__(self, layers, seed=0, noise=0.002):
        self.model = llama(
            layers=layers,
            heads=4,
            kv_heads=2,
            d_head=_D_HEAD,
            d_model=256,
            n_ctx=128,
            rope_theta=1e12,
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                if "norm" not in name:
                    weight.normal_(std=noise, generator=generator)
                if "mlp" in name:
                    weight.zero_()
            embedding = self.model.model.embed_tokens.weight
            embedding.zero_()
            embedding[:, _AXIS] = 6.0  # so that norms hardly change with what else is there
            embedding[:, _TOKEN] = torch.eye(D_VOCAB)
            self.model.lm_head.weight.zero_()
            self.model.lm_head.weight[:, _OUTPUT] = 6 * torch.eye(D_VOCAB)

    def parts(self, layer, head):
        """Weights of one head: q, k, v [d_head, d_model], o [d_model, d_head]."""
        attention = self.model.model.layers[layer].self_attn
        q = attention.q_proj.weight.view(4, _D_HEAD, -1)[head]
        k, v = (
            w.weight.view(2, _D_HEAD, -1)[head // 2] for w in (attention.k_proj, attention.v_proj)
        )
        return q, k, v, attention.o_proj.weight.view(-1, 4, _D_HEAD)[:, head]

    def copies(self, layer, head, source, target):
        """The head writes what it reads in `source` to `target`."""
        _, _, v, o = self.parts(layer, head)
        with torch.no_grad():
            v.zero_()
            v[:D_VOCAB, source] = torch.eye(D_VOCAB)
            o.zero_()
            o[target, :D_VOCAB] = 0.4 * torch.eye(D_VOCAB)

    def looks_back(self, layer, head, offset):
        """The head attends to the token `offset` before."""
        q, k, _, _ = self.parts(layer, head)
        angle = offset * self.model.model.rotary_emb.inv_freq[:_FAST]
        half = _D_HEAD // 2
        with torch.no_grad():
            q.zero_()
            k.zero_()
            k[:_FAST, _AXIS] = 1.0
            q[:_FAST, _AXIS] = 2 * angle.cos()
            q[half : half + _FAST, _AXIS] = -2 * angle.sin()

    def matches(self, layer, head, query, key):
        """The head attends where what is in `key` is what is in `query` here."""
        q, k, _, _ = self.parts(layer, head)
        with torch.no_grad():
            q.zero_()
            k.zero_()
            q[_STILL, query] = 20 * torch.eye(D_VOCAB)
            k[_STILL, key] = torch.eye(D_VOCAB)


def induction_model():
    """L0H0 writes the previous token, L1H2 finds the token that followed it: they copy."""
    made = Circuit(2)
    made.looks_back(0, 0, 1)
    made.copies(0, 0, _TOKEN, _PREVIOUS)
    made.matches(1, 2, _TOKEN, _PREVIOUS)
    made.copies(1, 2, _TOKEN, _OUTPUT)
    return bridge(made.model, "induction")


def reading_model(near, far=None):
    """L0H0 says the token `near` before, L0H2 the one `far` before; no other head does a thing."""
    made = Circuit(1)
    for head, offset in ((0, near), (2, far))[: 1 if far is None else 2]:
        made.looks_back(0, head, offset)
        made.copies(0, head, _TOKEN, _OUTPUT)
    return bridge(made.model, "reading")
