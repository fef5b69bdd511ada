"""The claims, and the rules by which tests decide them. All thresholds are *ours*.

A test has an estimate with a 95 % confidence interval over prompts (and over the draws of its
control, if it has one). It is *supported* if the whole interval lies on the threshold's right side
and, with a control, at most 1 draw in 20 is as large as the edit (`p_rank`); *contradicted* if the
whole interval lies on the wrong side; else, or if it could not be measured, we *cannot tell*.

A claim is contradicted if one of the tests that it needs is, supported if all of them are, else we
cannot tell; and so we cannot if claim 1 finds no slash heads. The rules came before any run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

#: Largest rank p-value of an edit among its control's draws; it needs 19 draws.
LEVEL = 0.05
#: Least slash score of a slash head, on natural text and on random tokens alike.
KAPPA = 0.1
#: It is also this many times uniform attention's, which is large in short prompts and windows.
TIMES_UNIFORM = 2.0
#: Share of a score (or of copying) that counts as kept, or, below it, as gone.
HALF = 0.5
#: Least difference of two shares of a score between an edit and its control.
SHARE = 0.1
#: Least difference of r1 between slash heads and the other heads of their layers.
R1 = 0.02
#: Least fall of r1 of queries or keys without the cone's axis.
R1_FALL = 0.1
#: Least correlation of a predicted with a measured profile.
CORRELATION = 0.9
#: Least effect on the predictions of natural text, in nats.
NATS = 0.01
#: Least share of what copying gains, or of prefix matching, that an edit must take or give.
COPIES = 0.1
#: Least gain of copying (loss on the first copy minus that on the second) of a model that copies.
GAIN = 0.5
#: Least prefix-matching score of an induction head.
PREFIX_MATCHING = 0.1
#: Least change of the rate at which a token is copied.
RATE = 0.05


class Claim(NamedTuple):
    """One claim: its number, a short name, and what it says."""

    number: int
    name: str
    says: str


CLAIMS = (
    Claim(
        1,
        "slash heads exist",
        "There are slash-dominant heads, and their scores hold on random tokens at the same κ.",
    ),
    Claim(
        2,
        "nearly rank one",
        "Pre-RoPE queries and keys of slash heads with Δ ≥ 1 are closer to rank one than those of "
        "other heads of the same layers.",
    ),
    Claim(
        3,
        "rank one is enough",
        "Rank-one queries and keys keep these slashes; a random direction, another head's "
        "direction, or removing the leading one does not.",
    ),
    Claim(
        4,
        "high and medium frequencies",
        "The high and the medium band carry the slashes; the low band does not, unlike as many "
        "random pairs.",
    ),
    Claim(
        5,
        "means predict the slash",
        "A head's mean query and mean key predict its logit profile and its peak; means of other "
        "heads and shuffled pairs do not.",
    ),
    Claim(
        6,
        "the cone is the origin",
        "Rank-one queries and keys come from the axis of the cone of the attention's inputs.",
    ),
    Claim(
        7,
        "slashes pass information",
        "Slash diagonals pass information, for predictions on natural text, copying, induction and "
        "clean/corrupt patching, beyond matched heads and other offsets, and after self-repair.",
    ),
    Claim(
        8,
        "slashes can be moved",
        "Shifted by one token, the slashes move, and copying moves with them.",
    ),
    Claim(
        9,
        "a planted slash suffices",
        "Constant queries and keys that make a slash, planted where the heads' own are gone, "
        "restore copying; planted at other offsets they do not.",
    ),
)


@dataclass(frozen=True)
class Rule:
    """When a test of a claim is supported.

    Attributes:
        claim: Number of the claim.
        question: What the estimate is.
        above: Whether it must be above the threshold, instead of below.
        threshold: The threshold.
        unit: What the estimate is counted in; empty for a share or a correlation.
        control: What the estimate is compared with; empty without a control.
        needed: Whether the claim needs the test; others are reported only.
        beyond_each: Whether the edit must also stand out of the control's single draws, by rank.
    """

    claim: int
    question: str
    above: bool
    threshold: float
    unit: str = ""
    control: str = ""
    needed: bool = True
    beyond_each: bool = True

    @property
    def ranked(self) -> bool:
        """Whether support needs a rank p-value of at most `LEVEL`."""
        return bool(self.control) and self.beyond_each

    def __str__(self) -> str:
        if not self.needed:
            return f"reported beside {self.control}" if self.control else "reported"
        text = f"{'above' if self.above else 'below'} {self.threshold:g} {self.unit}".rstrip()
        if self.control:
            text += f", beyond {self.control}"
        if self.ranked:
            text += f" (rank p at most {LEVEL:g})"
        return text


_MATCHED = "the same edit of matched heads"
_OFFSETS = "the same heads at other offsets"
_LAYERS = "other heads of the same layers"
_CHANGES = "equal changes along random directions"
_KL = "KL divergence from the clean predictions on natural text, slash diagonals removed"
_LOST = "share of what copying gains that is lost, slash diagonals removed"

RULES: dict[str, Rule] = {
    "score": Rule(
        1, "score of the strongest slash head minus that of uniform attention", True, KAPPA
    ),
    "random": Rule(1, "share of the slash heads that reach κ on random tokens", True, HALF),
    "random score": Rule(1, "their scores on random tokens over those on natural text", True, HALF),
    "r1 q": Rule(2, "r1 of their queries minus that of the other heads of their layers", True, R1),
    "r1 q beyond other heads": Rule(
        2, "r1 of their queries minus that of draws of others", True, R1, control=_LAYERS
    ),
    "r1 k": Rule(2, "r1 of their keys minus that of the other heads of their layers", True, R1),
    "r1 k beyond other heads": Rule(
        2, "r1 of their keys minus that of draws of others", True, R1, control=_LAYERS
    ),
    "rank one": Rule(3, "share of the scores kept with q and k at rank one", True, HALF),
    "rank one beyond random directions": Rule(
        3,
        "share kept at rank one minus that with random directions",
        True,
        SHARE,
        control="random directions",
    ),
    "rank one beyond other heads": Rule(
        3,
        "share kept at rank one minus that with other heads' directions",
        True,
        SHARE,
        control="directions of other heads",
    ),
    "leading direction removed": Rule(
        3, "share kept without the leading direction of q and k", False, HALF
    ),
    "low dropped": Rule(4, "share of the scores kept without the low band", True, HALF),
    "high and medium dropped": Rule(
        4, "share kept without the high and the medium band", False, HALF
    ),
    "low beyond random pairs": Rule(
        4,
        "share kept without the low band minus that without as many random pairs",
        True,
        0.0,
        control="as many random pairs",
        beyond_each=False,  # random pairs may be low ones
    ),
    "profile": Rule(5, "correlation of the predicted with the measured profile", True, CORRELATION),
    "peak": Rule(
        5,
        "share of the heads whose predicted peak is within one token of the measured one",
        True,
        HALF,
    ),
    "profile beyond other heads": Rule(
        5,
        "correlation minus that with the means of other heads",
        True,
        SHARE,
        control="means of other heads of the same layers",
    ),
    "profile beyond shuffled pairs": Rule(
        5,
        "correlation minus that with pairs shuffled over the frequencies",
        True,
        SHARE,
        control="shuffled pairs",
    ),
    "cone": Rule(6, "mean cosine of the attention's inputs to their mean", True, HALF),
    "axis removed": Rule(
        6, "share of the scores kept without the axis in the inputs of q and k", False, HALF
    ),
    "axis beyond random directions": Rule(
        6,
        "share lost without the axis minus that with equal changes along random directions",
        True,
        SHARE,
        control=_CHANGES,
    ),
    "r1 q without axis": Rule(6, "fall of r1 of q without the axis", True, R1_FALL),
    "r1 q beyond random directions": Rule(
        6, "fall of r1 of q minus that by the control", True, R1_FALL, control=_CHANGES
    ),
    "r1 k without axis": Rule(6, "fall of r1 of k without the axis", True, R1_FALL),
    "r1 k beyond random directions": Rule(
        6, "fall of r1 of k minus that by the control", True, R1_FALL, control=_CHANGES
    ),
    "predictions": Rule(7, _KL, True, NATS, "nats"),
    "predictions beyond matched heads": Rule(7, _KL, True, NATS, "nats", _MATCHED),
    "predictions beyond other offsets": Rule(7, _KL, True, NATS, "nats", _OFFSETS),
    "loss": Rule(
        7,
        "rise of the loss on natural text, slash diagonals removed",
        True,
        NATS,
        "nats",
        _MATCHED,
        needed=False,
    ),
    "copying": Rule(7, _LOST, True, COPIES),
    "copying beyond matched heads": Rule(7, _LOST, True, COPIES, control=_MATCHED),
    "copying beyond other offsets": Rule(7, _LOST, True, COPIES, control=_OFFSETS),
    "induction": Rule(
        7,
        "share of the induction heads' prefix matching that is lost",
        True,
        COPIES,
        control=_MATCHED,
    ),
    "clean into corrupt": Rule(
        7,
        "share of the logit difference that the clean run's diagonals restore in the corrupt run",
        True,
        COPIES,
        control=_MATCHED,
    ),
    "corrupt into clean": Rule(
        7,
        "share of the logit difference that the corrupt run's diagonals take from the clean run",
        True,
        COPIES,
        control=_MATCHED,
    ),
    "self-repair": Rule(
        7,
        "total effect on the copying loss minus the direct effect",
        True,
        0.0,
        "nats",
        needed=False,
    ),
    "moved": Rule(8, "score at Δ + 1 after the shift over the clean score at Δ", True, HALF),
    "next token": Rule(
        8,
        "fall of the rate at which the next token is copied, slashes shifted",
        True,
        RATE,
        control=_MATCHED,
    ),
    "token after next": Rule(
        8,
        "rise of the rate at which the token after the next is copied",
        True,
        RATE,
        control=_MATCHED,
    ),
    "planted": Rule(9, "share of the lost copying that planted slashes restore", True, HALF),
    "planted beyond other offsets": Rule(
        9,
        "share restored minus that of slashes planted at other offsets",
        True,
        SHARE,
        control="slashes planted at other offsets",
    ),
    "planted beyond other heads": Rule(
        9,
        "share restored minus that of slashes planted in other heads, the heads' own removed",
        True,
        SHARE,
        control="slashes planted in matched heads",
        needed=False,
    ),
}


def rules_of(claim: int) -> tuple[str, ...]:
    """Return the names of a claim's tests."""
    return tuple(name for name, rule in RULES.items() if rule.claim == claim)
