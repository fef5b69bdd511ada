"""The verdicts that `sp.evidence` must come to on models of which we know what is true."""

from functools import partial

from slashpatch.claims.verdicts import CANNOT_TELL, CONTRADICTED, SUPPORTED

from .. import claim_models as models

_OF = {"y": SUPPORTED, "n": CONTRADICTED, "?": CANNOT_TELL}


def _expected(marks):
    return [_OF[mark] for mark in marks]


#: By name: the model, what it is in words, and the verdict of each claim.
EXPECTED = {
    "true": (models.true_model, "all claims true", _expected("yyyyyyyyy")),
    "content": (
        models.content_slash_model,
        "slash made by content",
        _expected("ynnynnyny"),
    ),
    "low frequencies": (
        models.low_frequency_model,
        "slash made by low frequencies",
        _expected("yyynyyyyy"),
    ),
    "unread": (models.unread_model, "slash that nobody reads", _expected("yyyyyyn??")),
    "unread, copies": (
        partial(models.unread_model, copies=True),
        "slash that nobody reads; copies without it",
        _expected("yyyyyynn?"),
    ),
    "several directions": (
        models.several_directions_model,
        "slashes along several directions",
        _expected("yynyynyyy"),
    ),
    "equal rank": (
        models.equal_rank_model,
        "other heads as near to rank one",
        _expected("ynyyyyyyy"),
    ),
    "no cone": (models.no_cone_model, "rank one from biases", _expected("yyyyynyyy")),
    "unmovable": (
        models.unmovable_model,
        "slash that cannot move alone",
        _expected("y??y?yy?y"),
    ),
    "natural text only": (
        models.natural_only_model,
        "slashes on natural text only",
        _expected("?yyyyn??y"),
    ),
    "no copying": (models.not_copying_model, "does not copy", _expected("yyyyyy???")),
    "offset 0": (models.delta_zero_model, "slashes at Δ = 0 only", _expected("y????????")),
    "two heads": (models.two_heads_model, "two heads in all", _expected("y??y?y??y")),
    "GPT-2, slash": (
        models.gpt2_slash_model,
        "GPT-2-like with a slash, no RoPE",
        _expected("y?n??ny??"),
    ),
    "GPT-2, random": (
        models.gpt2_model,
        "GPT-2-like with random weights",
        _expected("n????????"),
    ),
    "random": (models.random_model, "random weights", _expected("n????????")),
    "shuffled": (
        lambda: models.shuffled_model(models.true_model()),
        "first model, W_Q and W_K shuffled in each head",
        _expected("yn?y??n??"),
    ),
}


def _default_random():
    """The default model's architecture with random weights."""
    import torch

    import slashpatch as sp

    model = sp.load(device="cpu")
    torch.manual_seed(0)
    made = type(model.original_model)(model.original_model.config)
    return sp.load(made, tokenizer=model.tokenizer)


def _default_shuffled():
    import slashpatch as sp

    return models.shuffled_model(sp.load(device="cpu"))


#: The same on models that are made of the default one, which take minutes.
REAL = {
    "default, random": (
        _default_random,
        "the default architecture with random weights",
        _expected("n????????"),
    ),
    "default, shuffled": (
        _default_shuffled,
        "the default model, W_Q and W_K shuffled in each head",
        _expected("ynyy?y???"),
    ),
}
