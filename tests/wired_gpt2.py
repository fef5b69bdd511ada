"""GPT-2, wired as in tests/wired.py, with slashes made by learned positions instead of RoPE."""

import torch

from .natural_tokens import D_VOCAB
from .wired import D_MODEL, N_CTX, Wired

#: Part of the residual stream that holds the position, as 16 complex numbers.
POSITION = slice(D_MODEL, D_MODEL + 32)
_HEADS = 4


class WiredGPT2(Wired):
    """A GPT-2 of 6 layers with 4 heads, to be wired."""

    def __init__(self, axis=4.0, seed=0):
        import transformers

        config = transformers.GPT2Config(
            vocab_size=D_VOCAB,
            n_embd=64 * _HEADS,
            n_layer=6,
            n_head=_HEADS,
            n_positions=N_CTX,
            n_inner=8,
            bos_token_id=0,
            eos_token_id=1,
            tie_word_embeddings=False,
        )
        self.model = transformers.GPT2LMHeadModel(config)
        self.still = list(range(32))
        self.start(self.model.transformer.wte.weight, 6, _HEADS, axis, seed)
        angle = torch.arange(N_CTX)[:, None] * 0.01 ** (torch.arange(16) / 15)
        with torch.no_grad():
            positions = torch.cat([angle.cos(), angle.sin()], 1) / 4
            self.model.transformer.wpe.weight[:, POSITION] = positions

    def parts(self, layer, head):
        """Weights of one head: q, k, v [d_head, d_model], o [d_model, d_head]; views."""
        attention = self.model.transformer.h[layer].attn
        joint = attention.c_attn.weight.T.view(3, _HEADS, 64, -1)
        return *joint[:, head], attention.c_proj.weight.view(_HEADS, 64, -1)[head].T

    def looks_back(self, layer, head, offset, strength=60.0):
        """Attend to the position `offset` before."""
        q, k, _, _ = self.parts(layer, head)
        root = (strength * 8) ** 0.5 / self.scale
        angle = offset * 0.01 ** (torch.arange(16) / 15)
        cos, sin = angle.cos().diag(), angle.sin().diag()
        turned = torch.cat([torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)])
        with torch.no_grad():
            q.zero_()
            k.zero_()
            k[:32, POSITION] = root * torch.eye(32)
            q[:32, POSITION] = root * turned
