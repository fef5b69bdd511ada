"""A model whose slash heads are known: W_q and W_k read one constant residual direction."""

import torch

from .tiny import D_VOCAB, bridge, llama


def planted_model(offsets, layers=1, d_head=32, strength=40.0, n_ctx=256, seed=0):
    """Head h of layer 0 is a slash head at offsets[h] (None: no slash; it reads content).

    Every embedding has the same large first component, so that after the norm it is the cone's
    axis. W_k maps the axis to 1 in every pair's real part; W_q maps it to the same turned back by
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


assert D_VOCAB
