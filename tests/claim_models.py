"""Hand-built models by which `sp.evidence` is tested: which claims are true is known.

The nine claims by number: 1 slashes exist, on random tokens too; 2 their q and k are
near rank one; 3 rank one keeps them; 4 high and medium frequencies carry them; 5 mean q and k
predict the profile; 6 the cone makes rank one; 7 slash diagonals pass information; 8 shifting a
slash moves copying; 9 planting one restores copying.

Unless a docstring says otherwise: a Llama of 4 layers with 8 heads, context 512, 512 tokens
(tests/natural_tokens.py). Slash heads are L0H2 and L1H5 at Δ = 1 and L0H6 at Δ = 2. L2H1 and L2H4
are induction heads, which read from PREVIOUS which token came before. L0H3 copies tokens to
PREVIOUS as L0H2 does, but attends by content: a slash can be planted there. The other heads attend
by content and predict, a little, what was seen. PlantSlash needs a strength of about 100 here.
"""

import copy
import functools

import torch

from .natural_tokens import D_VOCAB
from .wired import DEAD, FREQUENT, OUTPUT, PREVIOUS, SECOND, SHARP, TOKEN, Wired, wrapped
from .wired_gpt2 import WiredGPT2

#: Heads by what they do in most models.
SLASH, WEAK_SLASH, SLASH_TWO, SPARE = (0, 2), (1, 5), (0, 6), (0, 3)
INDUCTION = ((2, 1), (2, 4))
#: Logits of a head that glances at the token before: sharp, because BOS is to win over the rest.
_GLANCE = [12.0, 10.0] + [1.0] * 9 + [4.0] * 7 + [0.0] * 14
#: Logits of the five lowest of 16 frequencies.
_LOW = [0.0] * 11 + [80.0] * 5


@functools.cache
def true_model():
    """All nine claims are true."""
    return _readers(_slashes(Wired())).bridge("true")


@functools.cache
def content_slash_model(large_constant=False):
    """A strong slash at Δ = 1, on random tokens too, that is made by content.

    L0H2 attends to the token before with 5 % only, and to BOS otherwise, so it is no slash head at
    κ = 0.1. L1H5, the only slash head, looks for the token that L0H2 wrote down.

    True: 1, 7, 9, and 4 of the high band; the medium one alone is hardly needed. False: 2, 3, 5, 6,
    and 8 (a query that is moved finds no such token, and stays where it was).

    With `large_constant`, its queries and keys have a large constant part, which changes no
    logit: they are nearly rank one, so 2 is true, and rank one keeps nothing of the slash.
    """
    made = Wired(axis=10.0 if large_constant else 4.0)
    made.glances_back(*SLASH, 1, 0.05, _GLANCE)
    made.copies(*SLASH, TOKEN, SECOND, 1 / 0.05)
    made.seeks(*WEAK_SLASH, SECOND, 1)
    if large_constant:
        made.inflates(*WEAK_SLASH)
    made.copies(*WEAK_SLASH, TOKEN, PREVIOUS)
    return _readers(made).bridge("content-slash")


@functools.cache
def low_frequency_model():
    """The lowest third of the frequencies carries the slashes, with large logits.

    Phi-3, whose heads rotate 32 of 64 dimensions, with wavelengths from 6 to 55 tokens.

    True: all but 4.
    """
    made = Wired(partial=True, axis=10.0)  # so that norms hardly change between tokens
    return _readers(_slashes(made, amplitudes=_LOW, noise=0.0005)).bridge("low-frequency")


@functools.cache
def unread_model(copies=False):
    """Strong slashes as in `true_model`, whose outputs nobody reads.

    With `copies`, L0H1 passes on the token before: it attends to it with 5 %, and to BOS
    otherwise. So the model copies and predicts as `true_model` does, but without a slash head.

    True: 1 to 6. False: 7, 8, 9. (With planting at L0H3 there is nothing to restore.)
    """
    made = _slashes(Wired())
    for head in (SLASH, WEAK_SLASH, SLASH_TWO):
        made.copies(*head, TOKEN, DEAD, 0.3)
    if copies:
        made.glances_back(0, 1, 1, 0.05, _GLANCE)
        made.copies(0, 1, TOKEN, PREVIOUS, 1 / 0.05)
    return _readers(made, spare=False, induction=INDUCTION if copies else ()).bridge("unread")


@functools.cache
def several_directions_model():
    """Keys of four classes of tokens point in four directions, each with a slash of its own.

    The query has the parts of all. The slashes are RoPE-made and hold for any tokens.

    True: all but 3. (2 is true as a comparison: r1 of K is about 0.3, of other heads 0.15.)
    """
    made = Wired()
    made.marks(classes=True)
    for head, offset in ((SLASH, 1), (WEAK_SLASH, 1), (SLASH_TWO, 2)):
        made.looks_back_by_class(*head, offset)
    return _readers(_outputs(made)).bridge("several-directions")


@functools.cache
def equal_rank_model():
    """Other heads of layers 0 and 1 are as near to rank one: large constants change no logit.

    True: all but 2.
    """
    made = Wired(axis=10.0)
    for layer in (0, 1):
        for head in range(made.heads):
            made.inflates(layer, head)
    return _readers(_slashes(made)).bridge("equal-rank")


@functools.cache
def no_cone_model():
    """Rank-one queries and keys come from biases; the inputs lie on a cone that W_Q, W_K ignore.

    True: all but 6.
    """
    return _readers(_slashes(Wired(bias=True), by=None)).bridge("no-cone")


@functools.cache
def unmovable_model():
    """Copying needs two parts that agree, of which only one is a slash head's.

    L0H2 is as in `true_model`; L0H1 passes on the token before with 5 % of its attention. The
    induction heads need what both write. So if the slash moves, copying ends and does not move.

    True: all but 8. (No slash at Δ = 2.)
    """
    made = Wired()
    made.looks_back(*SLASH, 1)
    made.copies(*SLASH, TOKEN, PREVIOUS)
    made.glances_back(0, 1, 1, 0.05, _GLANCE)
    made.copies(0, 1, TOKEN, SECOND, 1 / 0.05)
    need = {"keys": (PREVIOUS, SECOND), "logit": 44.0, "rest": 30.0}
    _readers(made, second=None, **need).predicts(trust=1.0, copying=4.5, PREVIOUS=2)
    return made.bridge("unmovable")


@functools.cache
def unrestorable_model():
    """As `true_model`, but no other head passes on tokens to where they are read.

    True: all but 9, if slashes are planted in other heads. (In the same head, a planted slash
    restores what 7 and 8 show, so 9 cannot be false alone.)
    """
    return _readers(_slashes(Wired()), spare=False).bridge("unrestorable")


@functools.cache
def natural_only_model():
    """The slash heads read a mark of the frequent quarter of the tokens instead of the axis.

    Of random tokens, most have no mark, and no slash.

    False: 1. True: 2, 3, 4, 5, and 7 on natural text. Random tokens are not copied, so 7 and 8 do
    not hold there (a planted slash makes it copy, 9). Not determined: 6, since the mean of the
    inputs holds the mark in part. 1 cannot be false alone, because copying is tested on random
    tokens.
    """
    made = Wired()
    made.marks(frequent=True)
    return _readers(_slashes(made, by=FREQUENT)).bridge("natural-only")


@functools.cache
def not_copying_model():
    """Slash heads as in `true_model`, read by the logits, but no induction heads: no copying.

    True: 1 to 6, and 7 on natural text only. 8 and 9 cannot be told by copying.
    """
    return _readers(_slashes(Wired()), spare=False, induction=()).bridge("not-copying")


@functools.cache
def delta_zero_model():
    """As `not_copying_model`, but all slashes are at Δ = 0: nothing is said of Δ of 1 or more."""
    made = Wired()
    for head in (SLASH, WEAK_SLASH, SLASH_TWO):
        made.looks_back(*head, 0)
        made.copies(*head, TOKEN, SECOND, 0.5)
    return _readers(made, spare=False, induction=(), second=1).bridge("delta-zero")


@functools.cache
def far_slash_model(offset=30):
    """As `not_copying_model`, but all slashes are at a large offset.

    True: 1 to 6, and 7 on natural text only. 8 and 9 cannot be told by copying.
    """
    made = Wired()
    for head in (SLASH, WEAK_SLASH, SLASH_TWO):
        made.looks_back(*head, offset)
    return _readers(_outputs(made), spare=False, induction=()).bridge("far-slash")


@functools.cache
def two_heads_model():
    """Two layers of one head each: L0H0 is a slash head, L1H0 an induction head.

    The claims are as in `true_model`, but there are no other heads to compare with or to plant in.
    """
    made = Wired(layers=2, heads=1)
    made.looks_back(0, 0, 1)
    made.copies(0, 0, TOKEN, PREVIOUS)
    return _readers(made, spare=False, induction=((1, 0),)).bridge("two-heads")


@functools.cache
def gpt2_slash_model():
    """GPT-2, where learned positions make a slash and induction heads read it.

    6 layers with 4 heads. L0H2 and L0H1 are slash heads at Δ = 1, the second with a weak output;
    L0H3 is as in the others; L2H1 and L2H2 are induction heads.

    True: 1, 7. False: 2, 3 (queries hold the position), 6. 4, 5, 8 and 9 need RoPE.
    """
    made = WiredGPT2()
    for head, gain in ((SLASH, 1.0), ((0, 1), 0.3)):
        made.looks_back(*head, 1)
        made.copies(*head, TOKEN, PREVIOUS, gain)
    return _readers(made, induction=((2, 1), (2, 2))).bridge("gpt2-slash")


@functools.cache
def gpt2_model():
    """GPT-2 with random weights, and no slash heads: no RoPE, and nothing to be found.

    All claims are false or cannot be told.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=D_VOCAB, n_embd=128, n_layer=4, n_head=8, n_positions=512, bos_token_id=0
    )
    return wrapped(GPT2LMHeadModel(config), "gpt2")


@functools.cache
def random_model():
    """Llama with the proportions of SmolLM2-135M and random weights: 4 layers with 9 heads.

    All claims are false or cannot be told.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=D_VOCAB,
        hidden_size=144,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=512,
        rope_theta=1e5,
        initializer_range=144**-0.5,
        tie_word_embeddings=True,
    )
    return wrapped(LlamaForCausalLM(config), "random")


def shuffled_model(model, seed=0):
    """A copy of a model whose entries of W_Q and W_K are permuted within each head.

    For bridges with separate q and k projections. Where inputs lie on a cone, as in `true_model`,
    queries and keys stay near rank one, with random phases. So a few weak slashes (below 0.3) are
    left, at Δ = 0 or anywhere; 7, 8 and 9 are false.
    """
    made, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in made.blocks:
            for part in (block.attn.q, block.attn.k):
                weight = part.original_component.weight
                for rows in weight.split(made.cfg.d_head):
                    order = torch.randperm(rows.numel(), generator=generator)
                    rows.copy_(rows.flatten()[order.to(rows.device)].view_as(rows))
    return made


def _slashes(made, **how):
    """Wire the slash heads; return the model. `how` as for `Wired.looks_back`."""
    for head, offset in ((SLASH, 1), (WEAK_SLASH, 1), (SLASH_TWO, 2)):
        made.looks_back(*head, offset, **how)
    return _outputs(made)


def _outputs(made):
    """Let the slash heads write what they attend to; return the model."""
    for head, target, gain in (
        (SLASH, PREVIOUS, 1.0),
        (WEAK_SLASH, PREVIOUS, 0.3),
        (SLASH_TWO, SECOND, 1.0),
    ):
        made.copies(*head, TOKEN, target, gain)
    return made


def _readers(made, spare=True, induction=INDUCTION, keys=(PREVIOUS,), second=3, **logits):
    """Wire the readers of PREVIOUS and SECOND, and the spare head; return the model.

    `second` is how long before the predicted token the one in SECOND came.
    """
    if spare:
        made.copies(*SPARE, TOKEN, PREVIOUS)
    for head in induction:
        made.matches(*head, TOKEN, keys, **logits)
        made.copies(*head, TOKEN, OUTPUT, 1.4 / len(induction))
    made.predicts(PREVIOUS=2, SECOND=second)
    return made


@functools.cache
def shared_direction_model():
    """The other heads of layers 0 and 1 share the slashes' directions, with weak logits.

    So they have no slash, but rank one along their directions keeps the slashes at Δ = 1. Signs are
    as arbitrary as in any model: half of these heads have both directions reversed.

    False: 3. True: 1 and 6.
    """
    made = Wired()
    for layer in (0, 1):
        for head in range(made.heads):
            made.looks_back(layer, head, 1, [0.04 * value for value in SHARP], noise=0.04)
            q, k, _, _ = made.parts(layer, head)
            with torch.no_grad():
                sign = 1 - 2 * (head % 2)
                q.mul_(sign)
                k.mul_(sign)
    for head in (SLASH, WEAK_SLASH):
        made.looks_back(*head, 1)
        made.copies(*head, TOKEN, PREVIOUS)
    return _readers(made, spare=False).bridge("shared-direction")
