import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import slashpatch as sp
from slashpatch.data.prompts import prompt_set, repeated_random_tokens, token_texts
from slashpatch.errors import PromptError

from ..tiny import D_VOCAB, N_CTX, random_tokens


def same(a, b):
    return len(a.tokens) == len(b.tokens) and all(map(torch.equal, a.tokens, b.tokens))


def test_natural_text_is_seeded_and_of_the_length_asked_for(tiny):
    prompts = prompt_set(tiny, n_prompts=4, max_tokens=20)
    assert [len(tokens) for tokens in prompts.tokens] == [20] * 4
    assert prompts.n_tokens == 80
    assert same(prompts, prompt_set(tiny, n_prompts=4, max_tokens=20))
    assert prompts.digest == prompt_set(tiny, n_prompts=4, max_tokens=20).digest
    assert prompts.digest != prompt_set(tiny, n_prompts=4, max_tokens=20, seed=1).digest
    # A prompt stays what it is when more are asked for.
    assert torch.equal(prompt_set(tiny, n_prompts=2, max_tokens=20).tokens[1], prompts.tokens[1])


def test_default_length_fits_the_context(tiny):
    assert len(prompt_set(tiny, n_prompts=1).tokens[0]) == N_CTX


def test_random_tokens_are_uniform_over_ordinary_tokens(tiny):
    prompts = prompt_set(tiny, random_tokens=True, n_prompts=200, max_tokens=N_CTX)
    ids = torch.stack(prompts.tokens)
    assert (ids[:, 0] == 0).all()  # BOS
    drawn = ids[:, 1:].flatten()
    assert drawn.min() >= 4  # no specials
    assert drawn.max() == D_VOCAB - 1
    counts = torch.bincount(drawn, minlength=D_VOCAB)[4:].double()
    expected = len(drawn) / (D_VOCAB - 4)
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 76 + 5 * (2 * 76) ** 0.5  # five standard deviations
    assert same(prompts, prompt_set(tiny, random_tokens=True, n_prompts=200, max_tokens=N_CTX))


def test_texts_are_tokenised_alone_and_cut_only_on_request(tiny):
    prompts = prompt_set(tiny, ["w1 w2 w3", "w4"])
    assert [tokens.tolist() for tokens in prompts.tokens] == [
        tiny.to_tokens("w1 w2 w3")[0].tolist(),
        tiny.to_tokens("w4")[0].tolist(),
    ]
    cut = prompt_set(tiny, "w1 w2 w3", max_tokens=2)
    assert len(cut.tokens[0]) == 2


@pytest.mark.parametrize(
    "ids", [[5, 6, 7], [[5, 6, 7]], torch.tensor([5, 6, 7]), torch.tensor([[5, 6, 7]])]
)
def test_token_ids_are_taken_as_they_are(tiny, ids):
    assert prompt_set(tiny, ids).tokens[0].tolist() == [5, 6, 7]


def test_unequal_rows_of_token_ids(tiny):
    prompts = prompt_set(tiny, [[5, 6, 7], [8]])
    assert [tokens.tolist() for tokens in prompts.tokens] == [[5, 6, 7], [8]]


@pytest.mark.parametrize(
    "make",
    [
        iter,
        lambda rows: (row for row in rows),
        lambda rows: map(list, rows),
        lambda rows: dict(enumerate(rows)).values(),
        np.array,
    ],
)
def test_token_rows_from_any_iterable(tiny, make):
    rows = [[5, 6, 7], [8, 9, 10]]
    assert same(prompt_set(tiny, make(rows)), prompt_set(tiny, rows))


def test_rows_of_tensors_from_a_generator(tiny):
    rows = [torch.tensor([5, 6, 7]), torch.tensor([8])]
    assert same(prompt_set(tiny, (row for row in rows)), prompt_set(tiny, rows))
    assert prompt_set(tiny, iter([5, 6, 7])).tokens[0].tolist() == [5, 6, 7]


@pytest.mark.parametrize(
    "make", [iter, lambda texts: (text for text in texts), dict.fromkeys, pd.Series, np.array]
)
def test_texts_from_any_iterable(tiny, make):
    texts, made = ["w1 w2 w3", "w4"], make(["w1 w2 w3", "w4"])
    given = made.keys() if isinstance(made, dict) else made
    prompts = prompt_set(tiny, given, max_tokens=3)
    assert same(prompts, prompt_set(tiny, texts, max_tokens=3))
    assert prompts.source == "texts"


def test_a_generator_is_read_once(tiny):
    """By everything that takes prompts, and a second use of it is no silent repeat."""
    read = []

    def texts():
        for index in range(3):
            read.append(index)
            yield f"w{index} w1 w2 w3"

    expected = sp.scan(tiny, list(texts()), [1])
    read.clear()
    used = texts()
    assert torch.equal(sp.scan(tiny, used, [1]).scores, expected.scores)
    assert read == [0, 1, 2]
    with pytest.raises(PromptError, match="no prompts were given"):
        sp.scan(tiny, used, [1])
    measured = sp.measure(tiny, "KnockOut(L0H1, 1)", "loss", texts())
    assert measured.frame.equals(sp.measure(tiny, "KnockOut(L0H1, 1)", "loss", list(texts())).frame)


def test_what_a_tokenizer_returns_is_no_prompt(tiny):
    encoded = tiny.tokenizer(["w1 w2", "w3 w4"])
    with pytest.raises(PromptError, match=r"keys input_ids, .*; pass its input_ids"):
        prompt_set(tiny, encoded)
    assert len(prompt_set(tiny, encoded["input_ids"]).tokens) == 2


@pytest.mark.parametrize("prompts", [None, "w1 w2", ["w1"]])
def test_prompts_longer_than_the_context_are_not_asked_for(tiny, prompts):
    """Before natural text of that length is made, which would take long."""
    for max_tokens in (N_CTX + 1, 10**12):
        message = f"max_tokens={max_tokens} exceeds the model's context of {N_CTX} tokens; give at"
        with pytest.raises(PromptError, match=message):
            prompt_set(tiny, prompts, max_tokens=max_tokens)
        with pytest.raises(PromptError, match=message):
            sp.scan(tiny, prompts, max_tokens=max_tokens)
    assert prompt_set(tiny, prompts, max_tokens=N_CTX).n_tokens > 0
    with pytest.raises(PromptError, match="exceeds the model's context"):
        sp.scan(tiny, random_tokens=True, max_tokens=N_CTX + 1)


def test_a_file_is_read_in_pieces_that_start_as_prompts_do(tiny, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"w{i}" for i in range(25)))
    whole = tiny.to_tokens(file.read_text())[0]
    for given in (file, str(file)):
        prompts = prompt_set(tiny, given, max_tokens=11)
        assert [len(tokens) for tokens in prompts.tokens] == [11, 11, 6]
        assert all(tokens[0] == 0 for tokens in prompts.tokens)
        assert torch.cat([tokens[1:] for tokens in prompts.tokens]).tolist() == whole[1:].tolist()
    assert len(prompt_set(tiny, file, max_tokens=11, n_prompts=2).tokens) == 2


def test_unreadable_files(tiny, tmp_path):
    with pytest.raises(PromptError, match="no file"):
        prompt_set(tiny, tmp_path / "absent")
    with pytest.raises(PromptError, match="no file"):
        prompt_set(tiny, tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(PromptError, match="empty"):
        prompt_set(tiny, tmp_path / "empty.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(PromptError, match="UTF-8"):
        prompt_set(tiny, tmp_path / "binary.txt")


def test_a_text_that_is_no_path_is_a_text(tiny):
    assert prompt_set(tiny, "read w1.txt w2").source == "text"
    assert prompt_set(tiny, "w1\n.txt").source == "text"


def test_repeated_random_tokens(tiny):
    tokens = repeated_random_tokens(tiny, 3, 10)
    assert tokens.shape == (3, 21)
    assert torch.equal(tokens[:, 1:11], tokens[:, 11:])
    assert (tokens[:, 0] == 0).all()
    assert not torch.equal(tokens[0], tokens[1])


def test_prose_and_code_come_with_python():
    from slashpatch.data.natural_text import code, prose

    assert sys.version_info >= (3, 10)
    assert len(prose()) > 20
    assert len(code()) > 20


def test_rows_as_to_tokens_returns_them_are_rows(tiny):
    rows = [random_tokens(1, 5, seed) for seed in (1, 2)]
    assert [row.tolist() for row in prompt_set(tiny, rows).tokens] == [
        row[0].tolist() for row in rows
    ]
    with pytest.raises(PromptError, match="no prompts were given"):
        prompt_set(tiny, [])
    with pytest.raises(PromptError, match=r"got a row of type Tensor \[2, 5\]"):
        prompt_set(tiny, [random_tokens(2, 5)])


def test_the_text_of_each_token(tiny):
    tokens = torch.tensor([0, 4, 5, 3, 4])
    assert token_texts(tiny, tokens) == ("<s>", "the", "of", "<unk>", "the")
    assert token_texts(SimpleNamespace(tokenizer=None), tokens[:2]) == ("[0]", "[4]")
    assert token_texts(tiny, torch.tensor([D_VOCAB + 7])) == (f"[{D_VOCAB + 7}]",)


def test_a_sentencepiece_token_keeps_its_space():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"\u2581the": 0, "s": 1, "<0xE2>": 2}, unk_token="s"))
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    model = SimpleNamespace(tokenizer=PreTrainedTokenizerFast(tokenizer_object=made))
    assert token_texts(model, torch.tensor([0, 1, 2])) == (" the", "s", "\ufffd")
