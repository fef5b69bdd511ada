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

import functools

from .wired import DEAD, OUTPUT, PREVIOUS, SECOND, TOKEN, Wired

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
def content_slash_model():
    """A strong slash at Δ = 1, on random tokens too, that is made by content.

    L0H2 attends to the token before with 5 % only, and to BOS otherwise, so it is no slash head at
    κ = 0.1. L1H5, the only slash head, looks for the token that L0H2 wrote down.

    True: 1, 4, 7, 9. False: 2, 3, 5, 6, and 8 (a moved query finds no such token).
    """
    made = Wired()
    made.glances_back(*SLASH, 1, 0.05, _GLANCE)
    made.copies(*SLASH, TOKEN, SECOND, 1 / 0.05)
    made.seeks(*WEAK_SLASH, SECOND, 1)
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
    return _readers(made, spare=False, induction=copies).bridge("unread")


def _slashes(made, **how):
    """Wire the slash heads; return the model. `how` as for `Wired.looks_back`."""
    for head, offset, target, gain in (
        (SLASH, 1, PREVIOUS, 1.0),
        (WEAK_SLASH, 1, PREVIOUS, 0.3),
        (SLASH_TWO, 2, SECOND, 1.0),
    ):
        made.looks_back(*head, offset, **how)
        made.copies(*head, TOKEN, target, gain)
    return made


def _readers(made, spare=True, induction=True):
    """Wire the readers of PREVIOUS and SECOND, and the spare head; return the model."""
    if spare:
        made.copies(*SPARE, TOKEN, PREVIOUS)
    if induction:
        for head in INDUCTION:
            made.matches(*head, TOKEN, [PREVIOUS])
            made.copies(*head, TOKEN, OUTPUT, 0.7)
    made.predicts(PREVIOUS=2, SECOND=3)
    return made
