"""Transformers whose heads are wired by hand, and whose readers predict natural text.

The residual stream has the tokens' cone axis, a mark of BOS, and parts of `D_CODE` dimensions that
hold codes of tokens (tests/natural_tokens.py). Llama, or Phi-3 where half of each head does not
rotate. No MLP. A head that was told nothing attends by content and writes little.
"""

import copy

import torch
from transformer_lens.model_bridge import TransformerBridge

from .natural_tokens import D_CODE, D_VOCAB, codes, log_frequency, readout, tokenizer

AXIS, BOS = 0, 1
#: Parts of the residual stream: this token, the one before, another before it, what to predict
#: next, and what nobody reads.
TOKEN, PREVIOUS, SECOND, OUTPUT, DEAD = (
    slice(2 + index * D_CODE, 2 + (index + 1) * D_CODE) for index in range(5)
)
#: Four classes of tokens, and a mark of frequent tokens.
CLASSES, FREQUENT = slice(2 + 5 * D_CODE, 6 + 5 * D_CODE), 6 + 5 * D_CODE
D_MODEL, D_HEAD, N_CTX = FREQUENT + 2, 64, 512
#: Logits of rotary pairs 0 to 31 of a Llama's slash: two fast ones tell neighbours apart, medium
#: ones tell what these confuse.
SHARP = [4.5, 4.0] + [0.1] * 9 + [4.0] * 7 + [0.0] * 14


class Wired:
    """A model to be wired; `bridge` makes a TransformerBridge of it."""

    def __init__(self, layers=4, heads=8, partial=False, bias=False, axis=4.0, seed=0):
        import transformers

        common = {
            "vocab_size": D_VOCAB,
            "hidden_size": D_MODEL,
            "intermediate_size": 8,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": D_HEAD,
            "max_position_embeddings": N_CTX,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
        }
        if partial:
            config = transformers.Phi3Config(
                **common,
                partial_rotary_factor=0.5,
                rope_theta=10.0,
                original_max_position_embeddings=N_CTX,
            )
            self.model = transformers.Phi3ForCausalLM(config)
        else:
            config = transformers.LlamaConfig(**common, rope_theta=1e4, attention_bias=bias)
            self.model = transformers.LlamaForCausalLM(config)
        self.partial = partial
        self.inv_freq = self.model.model.rotary_emb.inv_freq.clone()
        n_pairs = len(self.inv_freq)
        #: Dimensions that hardly turn within the context, or not at all.
        self.still = (
            list(range(2 * n_pairs, D_HEAD))
            if partial
            else [d for d in range(D_HEAD) if d % n_pairs >= n_pairs - D_CODE // 2]
        )
        self.start(self.model.model.embed_tokens.weight, layers, heads, axis, seed)

    def start(self, embedding, layers, heads, axis, seed):
        """Set embeddings, and let all heads wander."""
        self.model.eval()
        self.embedding, self.layers, self.heads, self.axis = embedding, layers, heads, axis
        #: About the factor of the norms, with all parts filled.
        self.scale = (embedding.shape[1] / (axis**2 + 2)) ** 0.5
        self.generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                if "norm" not in name and "ln_" not in name:
                    weight.zero_()
            embedding[:, AXIS] = axis
            embedding[0, BOS] = 1.0
            embedding[:, TOKEN] = codes()
            for layer in range(layers):
                for head in range(heads):
                    self.wanders(layer, head)

    def marks(self, classes=False, frequent=False):
        """Mark each token's class of four, or the frequent tokens, in the embeddings."""
        order = log_frequency().argsort(descending=True)
        with torch.no_grad():
            if classes:
                self.embedding[order, CLASSES] = torch.eye(4).repeat(D_VOCAB // 4, 1)
            if frequent:
                self.embedding[order[: D_VOCAB // 4], FREQUENT] = self.axis / 2

    def parts(self, layer, head):
        """Weights of one head: q, k, v [d_head, d_model], o [d_model, d_head]."""
        attention = self.model.model.layers[layer].self_attn
        if self.partial:
            joint = attention.qkv_proj.weight.view(3, self.heads, D_HEAD, D_MODEL)
            q, k, v = joint[:, head]
        else:
            q, k, v = (
                getattr(attention, f"{name}_proj").weight.view(self.heads, D_HEAD, D_MODEL)[head]
                for name in "qkv"
            )
        return q, k, v, attention.o_proj.weight.view(D_MODEL, self.heads, D_HEAD)[:, head]

    def random(self, *shape):
        """Normal numbers."""
        return torch.randn(*shape, generator=self.generator)

    def wanders(self, layer, head, sharpness=2.0, writes=0.3):
        """Attend by content of all kinds, without aim, and predict what was seen, a little."""
        q, k, _, o = self.parts(layer, head)
        size = sharpness**0.5 / self.scale
        with torch.no_grad():
            for weight in (q, k):
                weight.zero_()
                weight[:, TOKEN] = size * self.random(D_HEAD, D_CODE)
                weight[:, AXIS] = 0.3 * size / self.axis * self.random(D_HEAD)
            self.copies(layer, head, TOKEN, OUTPUT, 0.3 * writes)
            o[DEAD, :D_CODE] = writes * self.random(D_CODE, D_CODE) / D_CODE**0.5

    def copies(self, layer, head, source, target, gain=1.0):
        """Write what is read in `source` to `target`."""
        _, _, v, o = self.parts(layer, head)
        with torch.no_grad():
            v.zero_()
            o.zero_()
            v[:D_CODE, source] = torch.eye(D_CODE) / self.scale
            o[target, :D_CODE] = gain * torch.eye(D_CODE)

    def _column(self, amplitudes, offset):
        """Values of a key and a query [d_head] whose logit is Σ amplitude · cos(θ (Δ − offset))."""
        n = len(self.inv_freq)
        root = (torch.as_tensor(amplitudes, dtype=torch.float32) * D_HEAD**0.5).sqrt()
        angle = self.inv_freq * offset
        q, k = torch.zeros(2, D_HEAD)
        k[:n], q[:n], q[n : 2 * n] = root, root * angle.cos(), -root * angle.sin()
        return q, k

    def looks_back(self, layer, head, offset, amplitudes=SHARP, noise=0.04, by=AXIS):
        """Attend to the token `offset` before: queries and keys near rank one.

        They come from a dimension of the stream (the cone's axis), or from biases if `by` is None.
        `noise` is the share of content.
        """
        q, k, _, _ = self.parts(layer, head)
        columns = self._column(amplitudes, offset)
        # What layer 0 writes makes the axis a smaller part of later layers' inputs.
        axis = self.axis * (0.93 if layer else 1.0)
        with torch.no_grad():
            for weight, column, name in zip((q, k), columns, "qk", strict=True):
                size = (noise * column.square().sum() / D_HEAD) ** 0.5 / self.scale
                weight.zero_()
                weight[:, TOKEN] = size * self.random(D_HEAD, D_CODE)
                if by is not None:
                    weight[:, by] = column / (self.scale * (axis if by == AXIS else axis / 2))
                else:
                    attention = self.model.model.layers[layer].self_attn
                    bias = getattr(attention, f"{name}_proj").bias
                    bias.view(self.heads, D_HEAD)[head] = column

    def glances_back(self, layer, head, offset, share, amplitudes):
        """Attend to the token `offset` before with a small share, and to BOS otherwise."""
        self.looks_back(layer, head, offset, amplitudes, noise=0.0)
        q, k, _, _ = self.parts(layer, head)
        with torch.no_grad():
            k[:, BOS] = -self.axis * k[:, AXIS]  # keys of BOS have no slash
            # Content that changes no logit, so that these queries and keys are not rank one.
            unused = [pair for pair, value in enumerate(amplitudes) if value == 0][:-1]
            for weight, pairs in ((q, unused[::2]), (k, unused[1::2])):
                size = 2 * weight[:, AXIS].norm() * self.axis / len(pairs) ** 0.5
                weight[pairs, TOKEN] = size * self.random(len(pairs), D_CODE)
        self.rests(layer, head, sum(amplitudes) + torch.tensor(1 / share - 1).log())

    @property
    def resting(self):
        """The dimension by which heads rest on BOS; in the slowest pair, if it rotates."""
        return self.still[len(self.still) // 2 - 1]

    def rests(self, layer, head, logit):
        """Attend to BOS with this logit, which is the same everywhere."""
        q, k, _, _ = self.parts(layer, head)
        root = float(logit * D_HEAD**0.5) ** 0.5
        with torch.no_grad():
            q[self.resting], k[self.resting] = 0, 0
            q[self.resting, AXIS] = root / (self.scale * self.axis)
            k[self.resting, BOS] = root / self.scale

    def matches(self, layer, head, query, keys, logit=30.0, rest=14.0):
        """Attend where what is in the parts `keys` is what is in `query` here, else to BOS.

        Parts that match give `logit` together, in equal shares.
        """
        q, k, _, _ = self.parts(layer, head)
        root = (logit / len(keys) * D_HEAD**0.5) ** 0.5 / self.scale
        with torch.no_grad():
            q.zero_()
            k.zero_()
            q[self.still, query] = root * torch.eye(D_CODE)
            for part in keys:
                k[self.still, part] = root * torch.eye(D_CODE)
        self.rests(layer, head, rest)

    def inflates(self, layer, head, times=60.0):
        """Add a large constant to queries and keys, which hardly changes any logit: r1 is high.

        It has `times` the squared norm of what content there is, in the slowest pair.
        """
        q, k, _, _ = self.parts(layer, head)
        still = [self.resting, self.still[-1]]
        with torch.no_grad():
            for weight in (q, k):
                weight[still] = 0
                norm = weight[:, TOKEN.start :].norm() * self.scale / D_CODE**0.5
                weight[still[0], AXIS] = times**0.5 * norm / (self.scale * self.axis)

    def looks_back_by_class(self, layer, head, offset):
        """Attend to the token `offset` before; keys of each class of tokens have their own pairs.

        The query has all these pairs, so each class has its slash, but keys are of rank four.
        """
        q, k, _, _ = self.parts(layer, head)
        with torch.no_grad():
            q.zero_()
            k.zero_()
            for kind, sharp in enumerate((6.0, 10.0, 18.0, 31.0)):
                logits = torch.zeros(len(self.inv_freq))
                logits[kind], logits[4 + kind] = sharp, 3.0
                logits[[12 + kind, 16 + kind]] = (40.0 - sharp - 3.0) / 2
                query, key = self._column(logits, offset)
                q[:, AXIS] += query / (self.scale * self.axis)
                k[:, CLASSES.start + kind] = key / self.scale

    def seeks(self, layer, head, wanted, offset, logit=17.0):
        """Attend to the token `offset` before because its code is the one in `wanted`.

        Codes are complex numbers in the fastest rotary pairs; the query's are rotated, so that
        equal tokens at other offsets do not match.
        """
        q, k, _, _ = self.parts(layer, head)
        n, half = len(self.inv_freq), D_CODE // 2
        root = (logit * D_HEAD**0.5) ** 0.5 / self.scale
        cos, sin = ((self.inv_freq[:half] * offset).cos(), (self.inv_freq[:half] * offset).sin())
        real, imaginary = torch.eye(D_CODE)[:half], torch.eye(D_CODE)[half:]
        with torch.no_grad():
            q.zero_()
            k.zero_()
            k[:half, TOKEN], k[n : n + half, TOKEN] = root * real, root * imaginary
            q[:half, wanted] = root * (cos[:, None] * real + sin[:, None] * imaginary)
            q[n : n + half, wanted] = root * (cos[:, None] * imaginary - sin[:, None] * real)

    def predicts(self, copying=5.0, trust=0.5, **weights):
        """Read the logits: frequency, this token, and parts of the stream by name, as lags.

        `PREVIOUS=2` reads from PREVIOUS what comes 2 tokens after the token whose code is there;
        None reads nothing. `trust` is the weight of these.
        """
        head = self.model.lm_head.weight
        with torch.no_grad():
            head.zero_()
            head[:, AXIS] = log_frequency() / self.axis
            head[:, TOKEN] = readout(1)
            head[:, OUTPUT] = copying * codes()
            for part, lag in weights.items():
                if lag is not None:
                    head[:, globals()[part]] = trust * readout(lag)
            head /= self.scale

    def bridge(self, name):
        """The wired model as a bridge."""
        return wrapped(self.model, name)


def wrapped(model, name):
    """A Transformers model with this vocabulary as a bridge."""
    return TransformerBridge.boot_transformers(
        f"tiny-{name}", hf_model=copy.deepcopy(model), tokenizer=tokenizer(), device="cpu"
    ).eval()
