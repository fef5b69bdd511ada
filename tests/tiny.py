"""Tiny random-weight models, built offline from Transformers configs."""

import functools
import re
import tempfile

import torch
from transformer_lens.model_bridge import TransformerBridge

D_VOCAB = 80
N_CTX = 64
#: So that natural text is not all unknown.
ENGLISH = [
    "the",
    "of",
    "a",
    "and",
    "is",
    "to",
    "in",
    "if",
    "import",
    "return",
    "def",
    "self",
    "for",
    "not",
    "as",
    "be",
]


@functools.cache
def tokenizer():
    """A word-level tokenizer that lies on disk, where the bridge reloads it from."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    specials = ["<s>", "</s>", "<pad>", "<unk>"]
    words = [*specials, *ENGLISH]
    words += [f"w{index}" for index in range(D_VOCAB - len(words))]
    made = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    folder = tempfile.mkdtemp(prefix="slashpatch-tests-")
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def llama(
    seed=0,
    layers=2,
    heads=4,
    kv_heads=2,
    d_head=8,
    sharpness=4.0,
    n_ctx=N_CTX,
    d_model=None,
    **config,
):
    """A Transformers Llama whose queries and keys are large enough for patterns with a shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    made = LlamaConfig(
        vocab_size=D_VOCAB,
        hidden_size=d_model or heads * d_head,
        head_dim=d_head,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=n_ctx,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **config,
    )
    model = LlamaForCausalLM(made).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= sharpness
    return model


def bridge(hf_model, name="tiny"):
    """A Transformers model as a bridge."""
    return TransformerBridge.boot_transformers(
        f"tiny-{name}", hf_model=hf_model, tokenizer=tokenizer(), device="cpu"
    ).eval()


def tiny_model(**kwargs):
    """A tiny Llama as a bridge; arguments as for `llama`."""
    return bridge(llama(**kwargs))


def random_tokens(batch, pos, seed=0):
    """Token ids without specials."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, D_VOCAB, (batch, pos), generator=generator)


def padded(rows, side):
    """Rows of different lengths as one batch [batch, pos], and its 0/1 mask."""
    longest = max(len(row) for row in rows)
    tokens = torch.full((len(rows), longest), 2)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        tokens[index, where] = row
        mask[index, where] = 1
    return tokens, mask


def named(value):
    """A test id that is the same in each process: functions print where they lie in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
