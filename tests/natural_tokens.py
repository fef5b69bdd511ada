"""A tokenizer of 512 tokens, trained on the natural text that comes with Python, and its counts.

For hand-built models that shall predict natural text: tokens have codes (random unit vectors), and
what follows a token is read from its code by least squares on counts.
"""

import functools
import tempfile

import torch

from slashpatch.data.natural_text import code, prose

D_VOCAB = 512
D_CODE = 32
#: Special tokens: BOS, EOS, padding, unknown.
SPECIALS = ["<s>", "</s>", "<pad>", "<unk>"]


@functools.cache
def texts():
    """Some of the natural text: the beginnings of its documents."""
    return [text[:6000] for text in [*prose(), *code()]]


@functools.cache
def tokenizer():
    """Byte-pair encoding that lies on disk, where a bridge reloads it from."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=D_VOCAB, special_tokens=SPECIALS, limit_alphabet=100, show_progress=False
    )
    made.train_from_iterator(texts(), trainer)
    assert made.get_vocab_size() == D_VOCAB
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    bos, eos, pad, unk = SPECIALS
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=bos, eos_token=eos, pad_token=pad, unk_token=unk
    )
    folder = tempfile.mkdtemp(prefix="slashpatch-tests-")
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@functools.cache
def codes():
    """Unit vectors of the tokens [d_vocab, d_code], far from one another; BOS has none."""
    made = torch.randn(D_VOCAB, D_CODE, generator=torch.Generator().manual_seed(0))
    made = torch.nn.functional.normalize(made, dim=1)
    for _ in range(50):  # tokens push their nearest neighbours away
        near = (made @ made.T - torch.eye(D_VOCAB)).clamp(min=0.3) - 0.3
        made = torch.nn.functional.normalize(made - 0.5 * near @ made, dim=1)
    made[0] = 0
    return made


@functools.cache
def counts():
    """How often each token occurs [d_vocab], and follows each other one at lags 1 to 3."""
    single, pairs = torch.zeros(D_VOCAB), torch.zeros(3, D_VOCAB * D_VOCAB)
    for text in texts():
        ids = torch.tensor(tokenizer()(text)["input_ids"][1:])
        single += torch.bincount(ids, minlength=D_VOCAB)
        for lag in (1, 2, 3):
            both = ids[:-lag] * D_VOCAB + ids[lag:]
            pairs[lag - 1] += torch.bincount(both, minlength=D_VOCAB**2)
    return single, pairs.view(3, D_VOCAB, D_VOCAB)


def log_frequency():
    """Log of each token's smoothed share of natural text [d_vocab]."""
    single, _ = counts()
    return ((single + 2) / (single + 2).sum()).log()


@functools.cache
def readout(lag):
    """Weights [d_vocab, d_code] that read from a token's code what comes `lag` tokens later.

    Relative to how often it comes anyway. Least squares, weighted by how often tokens occur.
    """
    single, pairs = counts()
    share, many = log_frequency().exp(), 10.0
    after = (pairs[lag - 1] + many * share) / (single[:, None] + many)
    ratio = (after / share).log()
    weighed = codes() * single[:, None]
    ridge = 0.1 * single.sum() / D_CODE * torch.eye(D_CODE)
    return torch.linalg.solve(codes().T @ weighed + ridge, weighed.T @ ratio).T
