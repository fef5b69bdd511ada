"""Writes docs/gallery.md: for each edit a pattern before and after, the formula, and the code.

`make gallery` runs this. The three lines of code that the page shows are the lines that make the
pattern of its picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pictures import PICTURES, draw_patterns

import slashpatch as sp
from slashpatch.reporting.figures import save_figure

PAGE = Path(__file__).parents[1] / "docs" / "gallery.md"

#: What the page's first block of code says, and what the pictures are made with.
SETUP = '''\
import slashpatch as sp

model = sp.load()
words = """river copper violin orchard planet ladder winter basket
tiger lantern harbor pepper mirror castle garden needle thunder
pillow market saddle candle blanket compass falcon""".split()
prompt = " ".join(words + words)'''

HEADER = """\
# Gallery of edits

Written by `make gallery`. Each picture has the attention pattern of one head of the default model
before and after one edit. Row i shows where token i reads, and colours have a square-root scale.
The edit is made by the three lines below the picture, after these:

```python
{setup}
```

The prompt is a list of words, twice over, so that a head that copies has something to find. In the
formulas, logit(Δ) is the logit with which token i reads token i−Δ, a sum over rotary pairs l:

```text
logit(Δ) = scale · Σ_l  a_l cos(θ_l Δ + φ_l)
```

θ_l is the frequency of pair l in radians per token. a_l is the product of the moduli of pair l in
the query and in the key, and φ_l the angle between them; both belong to this query and this key.
(Dimensions that a model does not rotate add their plain dot product.) Every edit can also be typed:
`"KnockOut(L16H0, 1)"`. All arguments are in the [reference](reference/edits.md).

"""


@dataclass(frozen=True)
class Entry:
    """One edit of the gallery.

    Attributes:
        edit: The call, as code.
        head: The head whose pattern is shown.
        formula: The definition in plain text.
        about: When it is sensible, in a sentence or two.
        seen: What the picture shows; {before} and {after} are mean attention at `offset`.
        offset: The offset of these figures; None for none.
    """

    edit: str
    head: str
    formula: str
    about: str
    seen: str
    offset: int | None = 1

    @property
    def name(self) -> str:
        """The edit's class."""
        return self.edit.partition("(")[0]

    @property
    def code(self) -> str:
        """The three lines that give the edited pattern."""
        layer, head = sp.Head.parse(self.head).layer, sp.Head.parse(self.head).head
        return (
            f"with sp.patch(model, sp.{self.edit}):\n"
            "    _, cache = model.run_with_cache(prompt)\n"
            f'pattern = cache["pattern", {layer}][0, {head}]'
        )


ENTRIES = (
    Entry(
        'KnockOut("L16H0", 1)',
        "L16H0",
        "logit(Δ) = −∞ for Δ in offsets, before the softmax\n"
        "S(i, i−Δ) = 0 after it, with renormalize=False",
        "The sharpest test of a slash: one diagonal goes, the rest of the head stays. The softmax "
        "gives its attention to the other tokens of the row.",
        "At Δ=1 there is {before:.2f} of the attention before, and {after:.2f} after. Most of it "
        "goes to the first tokens and to Δ=2.",
    ),
    Entry(
        'KeepOnly("L11H6", (0, 1))',
        "L11H6",
        "logit(Δ) = −∞ for Δ not in offsets",
        "The opposite of `KnockOut`: tells whether the slash alone is enough.",
        "All attention lies at Δ=0 and Δ=1; at Δ=1 {before:.2f} before, {after:.2f} after.",
    ),
    Entry(
        'ScaleOffsets("L16H0", 1, 0.1)',
        "L16H0",
        "logit(Δ) + log(factor) for Δ in offsets, before the softmax\n"
        "factor · S(i, i−Δ) after it, with renormalize=False",
        "Weakens a slash by degrees, or strengthens it with a factor above 1.",
        "At Δ=1 {before:.2f} before, {after:.2f} after. The softmax renormalises, so this is more "
        "than a tenth.",
    ),
    Entry(
        'AblateHeads("L16H0")',
        "L17H3",
        "z = 0, or the mean z, or z of a random reference token",
        "Removes what a head writes (z), and leaves its attention as it is. So the picture is of "
        "another head, L17H3 in the next layer, which reads what L16H0 writes. It finds the first "
        "copy of each word, 23 tokens back, through the previous-token slash of L16H0.",
        "At Δ=23 {before:.2f} before, {after:.2f} after.",
        23,
    ),
    Entry(
        'ShiftSlash("L16H0", by=4)',
        "L16H0",
        "logit'(Δ) = logit(Δ − by)",
        "Moves the slash and keeps its shape: what the head did for the token before, it does for "
        "another one. Exact, since it rotates the query of each pair by −θ_l · by.",
        "At Δ=5 {before:.2f} before, {after:.2f} after.",
        5,
    ),
    Entry(
        'DropBand("L16H0", "high")',
        "L16H0",
        "logit'(Δ) = scale · Σ_l a_l cos(θ_l Δ + φ_l) over the l that are not in the band",
        "Tells which frequencies carry a slash. Content and position of the band's pairs go both.",
        "Without its high frequencies the head has no slash: at Δ=1 {before:.2f} before, "
        "{after:.2f} after. It attends to the first token.",
    ),
    Entry(
        'FreezeBand("L16H0", "high")',
        "L16H0",
        "θ_l = 0 for l in the band",
        "The band's pairs still compare contents, but no longer know where tokens stand. The "
        "difference to `DropBand` is the band's content alone.",
        "At Δ=1 {before:.2f} before, {after:.2f} after. Attention is spread over all offsets.",
    ),
    Entry(
        'ScaleBand("L2H1", "high", 2)',
        "L2H1",
        "logit'(Δ) = scale · Σ_l g_l a_l cos(θ_l Δ + φ_l),  g_l = factor in the band, 1 elsewhere",
        "Strengthens or weakens what a band adds to the logits, content and position both.",
        "L2H1 has slashes at several offsets, where its high frequencies agree. Twice as strong, "
        "they leave the best one alone: at Δ=1 {before:.2f} before, {after:.2f} after.",
    ),
    Entry(
        'SwapBands("L16H0", "high", "low")',
        "L16H0",
        "the n-th pair of band a takes the θ of the n-th pair of band b, and the reverse",
        "The same content at other frequencies: tells whether the pairs that carry the slash must "
        "rotate fast.",
        "The slash is elsewhere, and there is more than one: at Δ=1 {before:.2f} before, "
        "{after:.2f} after.",
    ),
    Entry(
        'SetFrequencies("L16H0", lambda theta: theta / 4)',
        "L16H0",
        "logit'(Δ) = scale · Σ_l a_l cos(θ'_l Δ + φ_l)",
        "Any frequencies: a function of θ, numbers, or those of another head's layer (a name such "
        "as `L3H0`).",
        "With every θ a quarter, four tokens back look like one: the slash lies at Δ=4, and is "
        "four times as wide. At Δ=4 {before:.2f} before, {after:.2f} after.",
        4,
    ),
    Entry(
        'RankOne("L11H6", of="qk")',
        "L11H6",
        "q' = (q · u) u,  k' = (k · v) v   (u, v: leading right singular vectors, before RoPE)",
        "Keeps what the queries (or keys) of all tokens share, and removes what tells them apart.",
        "The columns of particular words go. What is left of the pattern depends on the offset: at "
        "Δ=0 {before:.2f} before, {after:.2f} after.",
        0,
    ),
    Entry(
        'DropDirection("L16H0")',
        "L16H0",
        "q' = W_Q (x − u uᵀx),  k' = W_K (x − u uᵀx)   (u: direction of the mean x elsewhere)",
        "Takes away the axis of the cone on which the attention inputs x lie, from this head's "
        "queries and keys only.",
        "The slash is gone, as it comes from what all inputs share: at Δ=1 {before:.2f} before, "
        "{after:.2f} after.",
    ),
    Entry(
        'PlantSlash("L3H4", offset=8, strength=60)',
        "L3H4",
        "logit'(Δ) = strength · mean_l cos(θ_l (Δ − offset))",
        "Makes any head a slash head, out of one constant query and one constant key: both "
        "conditions by hand.",
        "At Δ=8 {before:.2f} before, {after:.2f} after, whatever the words are.",
        8,
    ),
)


def patterns(entry, space):
    """The pattern of an entry's head without the edit, and as its lines of code give it."""
    at = sp.Head.parse(entry.head)
    _, cache = space["model"].run_with_cache(space["prompt"])
    exec(entry.code, space)
    return cache["pattern", at.layer][0, at.head].cpu(), space["pattern"].cpu()


def section(entry, before, after):
    """The lines of an entry on the page."""
    figures = {}
    if entry.offset is not None:
        figures["before"] = float(before.diagonal(-entry.offset).mean())
        figures["after"] = float(after.diagonal(-entry.offset).mean())
    seen = entry.seen.format(**figures)
    alt = f"Pattern of {entry.head} before and after {entry.name}"
    parts = (
        f"## {entry.name}",
        entry.about,
        f"![{alt}](pictures/{entry.name}.png)",
        f"*{entry.head} before and after. {seen}*",
        f"```text\n{entry.formula}\n```",
        f"```python\n{entry.code}\n```",
    )
    return "\n\n".join(parts) + "\n"


def main():
    """Draw every picture and write the page."""
    space: dict = {}
    exec(SETUP, space)
    sections = []
    for entry in ENTRIES:
        before, after = patterns(entry, space)
        title = entry.edit if len(entry.edit) < 36 else f"{entry.name}(...)"
        figure = draw_patterns([before, after], [f"{entry.head}, no edit", title])
        save_figure(figure, PICTURES / f"{entry.name}.png")
        sections.append(section(entry, before, after))
    PAGE.write_text(HEADER.format(setup=SETUP) + "\n".join(sections), encoding="utf-8")


if __name__ == "__main__":
    main()
