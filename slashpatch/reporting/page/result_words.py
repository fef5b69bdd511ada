"""What the page says of each kind of result, and the columns that it must have."""

#: Title of each kind of result.
TITLES = {
    "measure": "Effects of edits",
    "flow": "Flow between tokens",
    "copying": "Which token is copied",
    "paths": "Paths of an effect",
    "pairs": "Activations patched between two prompts",
    "direct": "Direct and total effects",
    "persistence": "Natural text against random tokens",
    "sweep": "One edit at every head",
    "screen": "One edit at every head, screened",
    "dose": "One edit at many doses",
    "circuit": "What a set does together",
}
#: What its numbers are.
ABOUT = {
    "measure": "Edited minus clean run, paired by prompt; rows against a control hold what is "
    "beyond the mean of its draws, with an interval over prompts and draws. p and q speak of other "
    "prompts with the same draws, p_rank of other draws.",
    "flow": "KL divergence in nats of a prediction when the token Δ before it is replaced.",
    "copying": "Repeated random tokens: how often the token at a lag in the first copy is the "
    "likeliest next token.",
    "paths": "What the edit changes through one input (q, k or v) of one later head alone.",
    "pairs": "Logit difference, right minus wrong answer, with activations of the other run of a "
    "pair; normalized: 0 is the unpatched run, 1 the other run.",
    "direct": "Direct: through the residual stream alone, with later layers and the final norm's "
    "scale held. Total: an ordinary run. Repair: total minus direct.",
    "persistence": "Slash scores of each head and offset; difference: random minus natural.",
    "sweep": "The same edit at one head at a time, the largest effect first.",
    "screen": "The same edit at one head at a time: estimated by gradients at all, run at those of "
    "largest estimate (top, flagged) and at some drawn at random (audit).",
    "dose": "Edited minus clean run at each dose, the number in the edit, paired by prompt; rows "
    "against a control hold what is beyond the mean of its draws.",
    "circuit": "Shares of what ablating all heads changes: of the members alone, of the model "
    "without them, and of each member.",
}
#: Columns of text.
TEXT = (
    *("edit", "metric", "of", "against", "name", "reader", "input", "why"),
    *("patched", "part", "direction", "what", "member"),
)
#: Titles of columns, where they are not the column's name.
LABELS = {
    "name": "head",
    "offset": "Δ",
    "as_large": "share of draws at least as large",
    "n": "prompts",
    "top1": "how often likeliest",
    "p_rank": "p_rank (other draws)",
    "q": "q",
    "p": "p (other prompts)",
}
#: Columns with an interval, and the columns of its ends.
ENDS = {
    "effect": ("low", "high"),
    "share": ("low", "high"),
    "flow": ("flow_low", "flow_high"),
    "top1": ("top1_low", "top1_high"),
    "loss": ("loss_low", "loss_high"),
    "normalized": ("normalized_low", "normalized_high"),
    "repaired": ("repaired_low", "repaired_high"),
    "natural": ("natural_low", "natural_high"),
    "random": ("random_low", "random_high"),
    "difference": ("low", "high"),
}
#: What a result must have to be shown: columns of text, and columns of numbers.
NEEDED = {
    "measure": (("edit", "metric", "of", "against"), ("effect", "low", "high")),
    "flow": (("edit",), ("offset", "flow", "flow_low", "flow_high", "effect")),
    "copying": (("edit",), ("lag", "top1", "top1_low", "top1_high", "effect")),
    "paths": (("reader", "input"), ("effect", "low", "high", "q")),
    "pairs": (
        ("patched", "direction"),
        ("effect", "normalized", "normalized_low", "normalized_high", "q"),
    ),
    "direct": (("edit", "part", "of"), ("effect", "low", "high", "q")),
    "persistence": (
        ("name",),
        ("layer", "head", "offset", "natural", "random", "difference", "low", "high", "q"),
    ),
    "sweep": (("name", "edit"), ("layer", "head", "effect", "low", "high", "q")),
    "dose": (("edit", "metric", "against"), ("dose", "effect", "low", "high")),
    "circuit": (("what", "member"), ("share", "low", "high", "value")),
    "screen": (
        ("name", "edit", "why"),
        ("layer", "head", "estimate", "effect", "low", "high", "q"),
    ),
}
