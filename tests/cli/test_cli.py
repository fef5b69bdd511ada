import importlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from typer.main import get_command

import slashpatch as sp
from slashpatch.cli import app as cli
from slashpatch.cli import generate, length

from ..tiny import N_CTX, llama, tokenizer

SMALL = ("--prompts", 2, "--max-tokens", 24, "--offsets", "0-3", "--device", "cpu")


def test_scan_prints_heatmaps_and_the_table(call, model):
    code, out, _ = call("scan", "-m", model, *SMALL)
    assert code == 0
    assert "natural text: highest score over Δ 0 to 3" in out
    assert "random tokens: highest score" in out
    assert "slash heads (κ = 0.1, natural text, seed 0)" in out
    assert "random tokens" in out
    assert "\x1b" not in out


def test_scan_as_json_equals_the_library(call, model):
    code, out, err = call("scan", "-m", model, *SMALL, "--json", "--kappa", 0.2, "--seed", 3)
    assert (code, err) == (0, "")
    record = json.loads(out)
    loaded = sp.load(model, device="cpu")
    expected = sp.scan(loaded, offsets=range(4), n_prompts=2, max_tokens=24, seed=3)
    assert [(row["head"], row["offset"]) for row in record["slash_heads"]] == [
        (str(entry.head), entry.offset) for entry in expected.slash_heads(0.2)
    ]
    assert record["slash_heads"][0]["score"] == pytest.approx(expected.slash_heads()[0].score)
    assert record["provenance"]["versions"]["torch"]


@pytest.mark.parametrize("suffix", [".csv", ".json", ".parquet"])
def test_scan_writes_tables(call, model, tmp_path, suffix):
    out = tmp_path / f"scan{suffix}"
    assert call("scan", "-m", model, *SMALL, "--out", out)[0] == 0
    read = {".csv": pd.read_csv, ".json": pd.read_json, ".parquet": pd.read_parquet}[suffix]
    frame = read(out)
    assert len(frame) == 2 * 4 * 4
    assert {"name", "offset", "score", "low", "high", "random_tokens"} <= set(frame.columns)


def test_scan_saves_a_scan_and_a_picture(call, model, tmp_path):
    out, plot = tmp_path / "scan.safetensors", tmp_path / "scan.svg"
    assert call("scan", "-m", model, *SMALL, "--out", out, "--plot", plot)[0] == 0
    assert sp.Scan.load(out).offsets == (0, 1, 2, 3)
    assert plot.read_text().startswith("<?xml")


def test_scan_of_a_file_of_random_tokens_and_under_an_edit(call, model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the of a and is to in if " * 30)
    _, out, _ = call("scan", "-m", model, *SMALL, "--text", text, "--json")
    assert json.loads(out)["provenance"]["prompts"][0]["source"] == "file text.txt"
    _, out, _ = call("scan", "-m", model, *SMALL, "--random-tokens", "--json")
    record = json.loads(out)
    assert record["provenance"]["prompts"][0]["source"] == "random tokens, seed 0"
    assert record["control"] is None
    _, out, _ = call("scan", "-m", model, *SMALL, "--edit", "KeepOnly(L1H1, 2)", "--json")
    record = json.loads(out)
    assert record["provenance"]["edits"] == ["KeepOnly(L1H1, offsets=2)"]
    best = record["slash_heads"][0]
    assert (best["head"], best["offset"], best["score"]) == ("L1H1", 2, pytest.approx(1))


def test_a_single_prompt_has_null_intervals(call, model):
    _, out, _ = call("scan", "-m", model, *SMALL, "--prompts", 1, "--json")
    assert json.loads(out)["slash_heads"][0]["low"] is None


def test_generate(call, model):
    arguments = ("generate", "the of a and", "--model", model, "--max-new-tokens", 6)
    code, out, _ = call(*arguments, "--edit", "KeepOnly([L0H0, L0H1, L1H1], 1)", "--device", "cpu")
    assert code == 0
    assert out.startswith("clean\n")
    assert "KeepOnly((L0H0, L0H1, L1H1), offsets=1)\n" in out
    _, out, _ = call(*arguments, "-e", "KnockOut(L0H0, 1)", "-e", "AblateHeads(L1H1)", "--json")
    record = json.loads(out)
    assert record["edits"] == ["KnockOut(L0H0, offsets=1)", "AblateHeads(L1H1)"]
    assert {"plain", "edited", "prompt"} <= set(record)


@pytest.mark.parametrize("device", ["auto", "disk"])
def test_models_larger_than_one_device(call, model, device):
    small = SMALL[:-1]
    _, out, _ = call("scan", "-m", model, *small, device, "--json")
    _, expected, _ = call("scan", "-m", model, *small, "cpu", "--json")
    ours, expected = json.loads(out), json.loads(expected)
    assert ours["slash_heads"] == expected["slash_heads"]
    assert ours["provenance"].get("weights_on") == {"auto": None, "disk": ["disk"]}[device]


def test_sampling_follows_the_seed(call, model):
    def text(seed):
        arguments = ("generate", "the of", "-m", model, "-e", "KnockOut(L0H0, 1)", "--sample")
        return json.loads(call(*arguments, "--json", "--seed", seed)[1])["plain"]

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_watch(call, model):
    arguments = ("watch", "the of a and", "--model", model, "--max-new-tokens", 5)
    code, out, _ = call(*arguments)
    assert code == 0
    assert len(out.splitlines()) == 5
    _, out, _ = call(*arguments, "--edit", "KeepOnly(L1H1, 1)", "--json")
    steps = json.loads(out)["steps"]
    assert [step["position"] for step in steps] == [4, 5, 6, 7, 8]
    for step in steps:
        best = step["heads"][0]
        assert (best["head"], best["offset"]) == ("L1H1", 1)
        assert best["weight"] == pytest.approx(1)
        assert best["score"] == pytest.approx(1)
    assert steps[0]["heads"][0]["reads"] == "a"
    assert steps[1]["heads"][0]["reads"] == "and"


def test_explain(call, model, tmp_path):
    arguments = ("-m", model, "--prompts", 2, "--max-tokens", 24)
    code, out, _ = call("explain", "L1H2", *arguments)
    assert code == 0
    assert out.startswith("L1H2 at Δ=")
    assert "Rule (ours)" in out
    record = json.loads(call("explain", "L1H2", *arguments, "--offset", 1, "--json")[1])
    assert (record["head"], record["offset"]) == ("L1H2", 1)
    (tmp_path / "printed.json").write_text(json.dumps(record))
    out = tmp_path / "one.json"
    code, text, _ = call("explain", "L1H2", *arguments, "--offset", 1, "--out", out)
    assert (code, text.splitlines()[-1]) == (0, f"wrote {out}")
    saved, printed = (sp.Explanation.load(path) for path in (out, tmp_path / "printed.json"))
    assert saved.to_dict() == printed.to_dict() == record
    table = tmp_path / "heads.csv"
    code, out, _ = call("explain", "--all", *arguments, "--kappa", 0.15, "--out", table)
    assert code == 0
    frame = pd.read_csv(table)
    # Heads and offsets are picked on one prompt, and measured on the other.
    assert ((frame.score >= 0.15) | (frame.verdict == "neither")).all()
    assert str(frame.name[0]) in out
    record = json.loads(call("explain", "--all", *arguments, "--kappa", 0.15, "--json")[1])
    assert [row["name"] for row in record["heads"]] == frame.name.tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("explain",), "give one head, such as L16H0, or --all"),
        (("explain", "L1H1", "--all"), "or --all"),
        (("explain", "--all", "--offset", "3"), "--offset goes with one head"),
        (("explain", "16.", "-m", "MODEL"), "expected a head"),
        (("explain", "L9H9", "-m", "MODEL"), "L9H9 does not exist"),
        (("explain", "L1H1", "--out", "x.csv"), "expected a name that ends in .json"),
        (("explain", "L1H1", "--out", "/absent/x.json"), "there is no directory"),
        (("explain", "--all", "--out", "x.pt"), "expected a name that ends in"),
        (("generate", "the", "-m", "MODEL", "-e", "DropBand(L1H1, pairs 5-9)"), "expected an edit"),
        (("generate", "the", "-m", "MODEL", "-e", "DropBand(L1H1, 'pairs 5-9')"), "outside the 4"),
        (("generate", "the", "-m", "MODEL", "-e", "RankOne(L1H1)"), "fit_rank_one"),
        (("scan", "-m", "absent.gguf"), "no file 'absent.gguf'"),
        (("scan", "-m", "MODEL", "--offsets", "-1"), "offsets such as"),
        (("scan", "-m", "MODEL", "--offsets", ""), "offsets such as"),
        (("scan", "-m", "MODEL", "--offsets", "30", "--max-tokens", "20"), "needs a prompt of at"),
        (("scan", "-m", "MODEL", "--kappa", "1.5"), "kappa must be a score from 0 to 1"),
        (("scan", "-m", "MODEL", "--text", "absent.txt"), "no file 'absent.txt'"),
        (("scan", "-m", "MODEL", "--text", "absent.txt", "--random-tokens"), "not both"),
        (("scan", "-m", "MODEL", "--out", "/absent/scan.csv"), "there is no directory"),
        (("scan", "-m", "MODEL", "--out", "scan.pt"), "expected a name that ends in .safetensors"),
        (("scan", "-m", "MODEL", "--plot", "scan.bmp"), "expected a name that ends in .png"),
        (("scan", "-m", "MODEL", "--edit", "Knockout(L0H0, 1)"), "did you mean KnockOut"),
        (("scan", "-m", "MODEL", "--edit", "KnockOut(L99H0, 1)"), "L99H0 does not exist"),
        (("scan", "-m", "MODEL", "--prompts", "0"), "--prompts"),
        (("scan", "-m", "MODEL", "--device", "tpu"), "tpu"),
        (("scan", "-m", "MODEL", "--nonsense"), "nonsense"),
        (("nonsense",), "nonsense"),
        (("generate", "the", "-m", "MODEL"), "give at least one --edit"),
        (("generate", "", "-m", "MODEL", "-e", "KnockOut(L0H0, 1)"), "empty"),
        (("generate", "the", "-m", "MODEL", "-e", "KnockOut(L0H0, 1)", "--max-new-tokens",
          str(N_CTX)), "exceed the model's context"),
        (("watch", "the", "-m", "MODEL", "--kappa", "-1"), "kappa"),
        (("watch", "", "-m", "MODEL"), "empty"),
        (("demo", "-m", "/absent/model"), "no such file or directory"),
    ],
)  # fmt: skip
def test_bad_input_ends_with_one_line_and_code_2(call, model, arguments, message):
    code, out, err = call(*(model if word == "MODEL" else word for word in arguments))
    assert code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("slashpatch: ")
    assert message in err


WITH_MODEL = ["scan", "explain", "generate", "watch", "demo", "measure", "flow", "copying", "sweep",
              "screen", "dose", "ablations", "circuit", "pairs", "direct", "persistence",
              "evidence", "check", "report"]  # fmt: skip
OF_ITS_OWN = {
    "report": ("--out", "never.html"),
    "explain": ("L0H1",),
    "pairs": ("--heads", "L0H0"),
    "generate": ("the",),
    "watch": ("the",),
    "dose": ("ScaleOffsets(L0H0, 1, {})", "0:2:1"),
    "ablations": ("L0H0",),
    "circuit": ("L0H0",),
}


@pytest.mark.parametrize("command", WITH_MODEL)
def test_every_command_names_the_model_by_an_option(call, model, command):
    """As an argument, the way that some commands took it before, it is one line that says so."""
    code, out, err = call(command, *OF_ITS_OWN.get(command, ()), model)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert f"unexpected extra argument(s) ({model})" in err
    assert "name the model with -m MODEL" in err
    for option in ("-m", "--model"):
        code, _, err = call(command, *OF_ITS_OWN.get(command, ()), option, "absent.gguf",
                            *(("-e", "KnockOut(L0H0, 1)")
                              if command in ("measure", "generate", "direct") else ()))  # fmt: skip
        assert (code, err) == (2, "slashpatch: no file 'absent.gguf'; expected a .gguf model\n")


def test_no_command_takes_a_model_argument():
    commands = get_command(cli.app).commands
    commands.pop("theory")  # trains models of its own
    commands.pop("emergence")  # measures checkpoints, which are its arguments
    assert sorted(commands) == sorted(WITH_MODEL)
    for command in commands.values():
        parameters = {parameter.name: parameter for parameter in command.params}
        assert parameters["model"].opts == ["--model", "-m"]
        arguments = [p.name for p in command.params if p.param_type_name == "argument"]
        expected = ([], ["head"], ["prompt"], ["edit", "values"], ["heads"], ["members"])
        assert arguments in expected


def test_an_argument_too_many_of_a_command_without_a_model(call):
    code, _, err = call("theory", "train", "tiny")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "extra argument" in err
    assert "MODEL" not in err


@pytest.mark.parametrize(
    "arguments",
    [("scan",), ("scan", "--random-tokens"), ("scan", "--text", "TEXT"), ("explain", "L0H1"),
     ("explain", "--all"), ("measure", "-e", "KnockOut(L0H0, 1)"), ("flow",), ("sweep",)],
)  # fmt: skip
def test_more_tokens_than_the_context_holds_are_refused(call, model, arguments, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the of a and " * 200)
    arguments = [text if word == "TEXT" else word for word in arguments]
    for n_tokens in (99999, N_CTX + 1) if arguments == ["scan"] else (99999,):
        code, out, err = call(*arguments, "-m", model, "--max-tokens", n_tokens)
        assert (code, out) == (2, "")
        assert err == (
            f"slashpatch: --max-tokens {n_tokens} exceeds the model's context of {N_CTX} tokens; "
            f"give at most {N_CTX}\n"
        )


def test_the_default_length_is_cut_to_the_context(call, model):
    code, out, _ = call("scan", "-m", model, "--prompts", 2, "--json")
    assert code == 0
    assert json.loads(out)["n_tokens"] == 2 * N_CTX


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("scan", "--offsets", "0-3"), "2 passes over each: roughly 2 minutes"),
        (("scan", "--offsets", "0-3", "--random-tokens"), "1 pass over each: roughly 48 seconds"),
        (("explain", "L0H1"), "7 passes over each: roughly 6 minutes"),
        (("flow", "--offsets", "1-3", "--replaced", 3), "4 passes over each: roughly 3 minutes"),
        (("copying", "--tokens", 12), "1 pass over each: roughly 48 seconds"),
        (("measure", "-e", "KnockOut(L0H0, 1)", "--control", "random-heads:2", "--metric", "loss"),
         "4 passes over each: roughly 3 minutes"),
        (("sweep", "--heads", "L1, L0H2", "--metric", "loss"), "4 passes over each: roughly 3 min"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)  # fmt: skip
def test_a_long_run_is_announced_on_stderr(call, model, monkeypatch, arguments, said):
    """What is used, and roughly how long it takes: here each token takes a second."""
    size = () if "--tokens" in arguments else ("--max-tokens", 24)
    command = (*arguments, "-m", model, "--prompts", 2, *size, "--json")
    code, out, err = call(*command)
    assert (code, err) == (0, "")
    monkeypatch.setattr(length, "_seconds_of_pass", lambda model, n_tokens: 1.0 * n_tokens)
    code, announced, err = call(*command)
    assert code == 0
    assert len(err.splitlines()) == 1
    assert err.startswith("slashpatch: 2 prompts of 24 tokens, ")
    assert said in err
    assert "judged by one pass of 24 tokens" in err
    assert announced == out


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(31.0, "31 seconds"), (300.0, "5 minutes"), (5400.0, "2 hours"), (3e5, "3 days")],
)
def test_durations(seconds, said):
    assert length._duration(seconds) == said


def test_a_short_pass_is_timed_and_a_longer_one_only_where_the_run_is_long(
    call, model, monkeypatch
):
    timed = []

    def note(model, n_tokens):
        timed.append(n_tokens)
        return 0.5 * n_tokens if n_tokens == 8 else 100.0

    monkeypatch.setattr(length, "_seconds_of_pass", note)
    monkeypatch.setattr(length, "_TIMED", (8, 32))
    command = ("scan", "-m", model, "--random-tokens", "--max-tokens", 16)
    assert call(*command, "--prompts", 1)[2] == ""
    assert timed == [8]
    assert "8 prompts of 16 tokens, 1 pass over each: roughly 13 minutes" in call(*command)[2]
    assert timed == [8, 8, 16]
    monkeypatch.undo()
    assert 0 < length._seconds_of_pass(sp.load(model, device="cpu"), 16) < 60


def test_sweep_and_explain_take_ranges_and_layers(call, model):
    rest = ("-m", model, "--prompts", 3, "--max-tokens", 13, "--metric", "loss", "--json")
    for heads, expected in (
        ("L1", "L1H0 L1H1 L1H2 L1H3"),
        ("L0-1H2, L1H0-1", "L0H2 L1H0 L1H1 L1H2"),
    ):
        code, out, err = call("sweep", "--heads", heads, *rest)
        assert code == 0, err
        assert sorted(row["name"] for row in json.loads(out)["effects"]) == expected.split()
    for heads, message in (("L9", "L9H0 does not exist"), ("L1H2-", "expected a head such as")):
        code, _, err = call("sweep", "--heads", heads, *rest)
        assert (code, len(err.splitlines())) == (2, 1)
        assert message in err
    code, _, err = call("explain", "L1", "-m", model)
    assert code == 2
    assert "explain takes one head, got 'L1'" in err


def test_nothing_is_written_when_the_scan_fails(call, model, tmp_path):
    out = tmp_path / "scan.csv"
    assert call("scan", "-m", model, "--offsets", "60", "--max-tokens", 20, "--out", out)[0] == 2
    assert list(tmp_path.iterdir()) == []


def started(*arguments, **kwargs):
    command = [sys.executable, "-m", "slashpatch.cli", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    )


def test_help_and_version_load_nothing_heavy():
    code = """if True:
        import sys
        sys.argv = ["slashpatch", sys.argv[1]]
        from slashpatch.cli.app import main
        try:
            main()
        finally:
            print([name for name in ("torch", "transformers", "pandas") if name in sys.modules])
    """
    for option, expected in (("--help", "demo"), ("--version", sp.__version__)):
        out = subprocess.run(
            [sys.executable, "-c", code, option], capture_output=True, text=True, check=True
        ).stdout
        assert expected in out
        assert out.strip().endswith("[]")


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import slashpatch, sys; print([n for n in ('torch', 'transformers') if n in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"


def test_no_room_has_the_name_of_a_public_function():
    """But `theory`, which is both."""
    entries = {path.stem for path in Path(sp.__file__).parent.iterdir()}
    assert entries & set(sp.__all__) == {"theory"}
    code = "import slashpatch, slashpatch.data.heads; assert not callable(slashpatch.theory)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert callable(sp.heads)


def test_every_public_name_resolves():
    for name in sp.__all__:
        assert getattr(sp, name) is not None
    assert set(sp.__all__) <= set(dir(sp))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        sp.nonsense  # noqa: B018


def test_ctrl_c_ends_with_one_line(call, monkeypatch, model):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "load_bridge", interrupted)
    assert call("watch", "the of a", "-m", model) == (130, "", "slashpatch: interrupted\n")


def test_a_signal_in_the_middle_of_a_scan_ends_with_one_line(call, monkeypatch, model, tmp_path):
    """A real SIGINT, in the second forward pass; also where tests run with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    module = importlib.import_module("slashpatch.bridge")
    run, passes = module.run_for_hooks, []

    def interrupted(*args):
        passes.append(1)
        if len(passes) == 2:
            signal.raise_signal(signal.SIGINT)
        run(*args)

    monkeypatch.setattr(module, "run_for_hooks", interrupted)
    out = tmp_path / "scan.csv"
    try:
        ended = call("scan", "-m", model, *SMALL, "--out", out)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended == (130, "", "slashpatch: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_markup_in_user_text_is_text(call, model, tmp_path):
    out = tmp_path / "x[b].csv"
    code, text, _ = call("scan", "-m", model, *SMALL, "--out", out)
    assert (code, out.exists()) == (0, True)
    assert f"wrote {out}" in text
    edit = "AblateHeads(L0H0, mode=mean, reference='[/INST] [bold]the of')"
    code, text, _ = call("generate", "the of a", "-m", model, "-e", edit)
    assert code == 0
    assert "[/INST] [bold]the of" in text


def test_watch_never_names_a_token_that_is_not_there(call, model):
    arguments = ("watch", "the of", "-m", model, "--kappa", 0, "--top", 500, "--max-new-tokens", 3)
    steps = json.loads(call(*arguments, "--offsets", "0-9", "--json")[1])["steps"]
    for step in steps:
        assert step["heads"]
        assert max(head["offset"] for head in step["heads"]) <= step["position"]


def test_no_command_prints_help(call):
    code, out, err = call()
    assert (code, err) == (2, "")
    assert "Commands" in out


def test_a_refused_model_is_one_line(tmp_path, call, capsys):
    from transformers import GPTJConfig, GPTJForCausalLM

    config = GPTJConfig(vocab_size=80, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)
    GPTJForCausalLM(config).save_pretrained(tmp_path / "gptj")
    tokenizer().save_pretrained(tmp_path / "gptj")
    capsys.readouterr()
    code, _, err = call("scan", "-m", tmp_path / "gptj", *SMALL)
    assert code == 2
    assert len(err.splitlines()) == 1, err


def test_a_closed_pipe_is_no_error(model):
    process = started("watch", "the of a", "-m", model, "--max-new-tokens", "50")
    process.stdout.readline()
    process.stdout.close()
    process.wait()
    assert "Traceback" not in process.stderr.read()


EFFECTS = ("--prompts", 3, "--device", "cpu")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            (
                "measure",
                "-e",
                "KnockOut(L0H1, 1)",
                "--max-tokens",
                13,
                "--control",
                "random-heads:2",
                "--metric",
                "loss",
                "--metric",
                "kl",
            ),
            "random-heads:2",
        ),
        (
            (
                "measure",
                "-e",
                "KnockOut(L0H1, 1)",
                "-e",
                "AblateHeads(L1H1)",
                "--together",
                "--max-tokens",
                13,
            ),
            "then",
        ),
        (
            ("flow", "-e", "KnockOut(L0H1, 1)", "--max-tokens", 13, "--offsets", "1-3"),
            "too few to tell",
        ),
        (("flow", "--max-tokens", 13, "--offsets", "1-3", "--random-tokens"), "flow"),
        (("copying", "-e", "ShiftSlash(L0H1, 1)", "--tokens", 9), "copies no lag"),
        (("sweep", "--heads", "L0H1, L1H2", "--max-tokens", 13), "L1H2"),
        (
            (
                "sweep",
                "-e",
                "KnockOut({head}, {offset})",
                "--offsets",
                "1-2",
                "--heads",
                "L0H1",
                "--metric",
                "loss",
                "--max-tokens",
                13,
            ),
            "L0H1",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_effects(call, model, tmp_path, arguments, said):
    command, *rest = arguments
    code, out, err = call(command, "-m", model, *rest, *EFFECTS)
    assert code == 0, err
    assert said in " ".join(out.split())
    code, out, err = call(
        command, "-m", model, *rest, *EFFECTS, "--json", "--out", tmp_path / "a.json"
    )
    assert code == 0, err
    record = json.loads(out)
    assert record["kind"] == command
    assert record["effects"]
    assert json.loads((tmp_path / "a.json").read_text()) == record
    if command != "measure":
        assert call(command, "-m", model, *rest, *EFFECTS, "--plot", tmp_path / "a.png")[0] == 0
        assert (tmp_path / "a.png").stat().st_size > 5000


def test_sweep_goes_on(call, model, tmp_path):
    out = tmp_path / "sweep.parquet"
    rest = ("--max-tokens", 13, "--heads", "L0H1, L1H2", *EFFECTS)
    assert call("sweep", "-m", model, *rest, "--out", out)[0] == 0
    again = call("sweep", "-m", model, *rest, "--out", out, "--resume")
    assert again[0] == 0
    assert "L1H2" in again[1]
    code, _, err = call("sweep", "-m", model, *rest, "--out", out, "--resume", "--seed", 3)
    assert code == 2
    assert "is of another run" in err


def test_screen_shows_why_rows_were_run_and_goes_on(call, model, tmp_path):
    out, plot = tmp_path / "screen.json", tmp_path / "screen.png"
    rest = ("--max-tokens", 13, "--prompts", 4, "--verify", 2, "--audit", 1)
    code, shown, err = call("screen", "-m", model, *rest, "--out", out, "--plot", plot)
    assert code == 0, err
    assert plot.stat().st_size > 1000
    for word in ("estimate", "why", "top", "audit", "were selected by estimates on other prompts"):
        assert word in shown
    code, again, _ = call("screen", "-m", model, *rest, "--out", out, "--resume", "--json")
    assert code == 0
    record = json.loads(again)
    assert record == json.loads(out.read_text())
    assert record["audit"][0]["audited"] == 1
    code, _, err = call("screen", "-m", model, *rest, "--out", out, "--resume", "--audit", 3)
    assert code == 2
    assert "is of another run: its audit is 1, here it is 3" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("screen", "--resume"), "--resume goes with --out"),
        (("screen", "--metric", "kl"), "kl has no gradient at the clean run"),
        (("screen", "--metric", "kl", "--proxy", "top1"), "top1 has no gradient"),
        (("measure",), "give at least one --edit"),
        (("measure", "-e", "KnockOut(L0H1, 1)", "--metric", "lost"), "no metric 'lost'"),
        (("measure", "-e", "KnockOut(L0H1, 1)", "--control", "random"), "no control 'random'"),
        (("measure", "-e", "KnockOut(L0H1, 1)", "--out", "a.csv"), ".parquet, .json"),
        (("flow", "--text", "a.txt", "--random-tokens"), "not both"),
        (("flow", "--plot", "a.parquet"), "ends in .png, .svg, .pdf"),
        (("sweep", "--resume"), "--resume goes with --out"),
        (("pairs",), "give at least one --heads"),
        (("pairs", "--heads", "L0H0.w"), "or a diagonal such as"),
        (("pairs", "--heads", "L0H0", "--pairs", "absent.csv"), "no file 'absent.csv'"),
        (("direct",), "give at least one --edit"),
        (("direct", "-e", "KnockOut(L0H1, 1)", "--metric", "slash"), "reads attention"),
        (("sweep", "-e", "KnockOut(L0H1, 1)"), "expected a text with {head}"),
    ],
)
def test_effects_refuse(call, model, arguments, said):
    command, *rest = arguments
    code, out, err = call(command, "-m", model, *rest)
    assert (code, out) == (2, "")
    assert said in " ".join(err.split())
    assert "Traceback" not in err


def test_pairs(call, model, tmp_path):
    out, plot, lines = (tmp_path / name for name in ("pairs.json", "pairs.png", "pairs.jsonl"))
    rest = ("--heads", "L0H1@1, L1H2.k", "--heads", "L1H0", "--prompts", 3, "--tokens", 6)
    code, shown, err = call("pairs", "-m", model, *rest, "--out", out, "--plot", plot)
    assert code == 0, err
    for word in ("L0H1@1", "L1H2.k", "denoising", "noising", "normalized", "3 prompts (copying"):
        assert word in shown
    assert plot.stat().st_size > 5000
    code, again, _ = call("pairs", "-m", model, *rest, "--json")
    assert json.loads(again) == json.loads(out.read_text())
    row = {"clean": [5, 6, 7], "corrupt": [5, 8, 7], "right": 9, "wrong": 10}
    lines.write_text(json.dumps(row) + "\n" + json.dumps(row | {"right": 11}))
    rest = ("--pairs", lines, "--heads", "L0H0-1", "--together", "--direction", "noising")
    code, shown, err = call("pairs", "-m", model, *rest, "--parts", "q,v", "--json")
    assert code == 0, err
    found = json.loads(shown)["effects"]
    assert [row["patched"] for row in found] == ["L0H0.q, L0H1.q", "L0H0.v, L0H1.v"]
    assert {row["direction"] for row in found} == {"noising"}


def test_direct(call, model, tmp_path):
    out, plot = tmp_path / "direct.json", tmp_path / "direct.png"
    rest = ("-e", "KnockOut(L0H1, 1)", "-e", "AblateHeads(L1H2)", "--together", "--prompts", 3)
    rest += ("--max-tokens", 13)
    code, shown, err = call("direct", "-m", model, *rest, "--out", out, "--plot", plot)
    assert code == 0, err
    for word in ("direct", "total", "repair", "KnockOut(L0H1, offsets=1)"):
        assert word in shown
    assert plot.stat().st_size > 5000
    code, again, _ = call("direct", "-m", model, *rest, "--json")
    record = json.loads(again)
    assert record == json.loads(out.read_text())
    assert [row["part"] for row in record["effects"]] == [
        "direct", "direct, new norm", "total", "repair"
    ]  # fmt: skip


def test_theory(call, tmp_path):
    names = {
        name: tmp_path / name for name in ("a.png", "a.parquet", "a.safetensors", "p.csv", "p.svg")
    }
    code, out, err = call(
        "theory",
        "train",
        "--steps",
        20,
        "--seeds",
        2,
        "--plot",
        names["a.png"],
        "--out",
        names["a.parquet"],
    )
    assert code == 0, err
    assert "the slash passes 0.3 after (steps): in 0 of 2 seeds" in out
    assert set(pd.read_parquet(names["a.parquet"])["seed"]) == {0, 1}
    checkpoint = ("--steps", 20, "--seeds", 1, "--checkpoint", names["a.safetensors"])
    code, out, _ = call("theory", "train", *checkpoint, "--frequencies", "1,0.5", "--json")
    assert code == 0
    assert json.loads(out)["settings"]["frequencies"] == [1.0, 0.5]
    code, _, err = call("theory", "train", *checkpoint, "--resume")
    assert code == 2
    assert "another configuration: its frequencies" in err
    phase = (
        "theory",
        "phase",
        "--steps",
        5,
        "--seeds",
        1,
        "--rows",
        "cone=0,1",
        "--columns",
        "offset=1,2",
    )
    code, out, err = call(*phase, "--out", names["p.csv"], "--plot", names["p.svg"])
    assert code == 0, err
    assert "in 0 of 1 seeds" in out
    assert all(path.stat().st_size for path in names.values())


def test_theory_text(call, tmp_path, monkeypatch):
    from slashpatch.theory.text import training

    texts = dict(list(training.python_text().items())[:60])
    monkeypatch.setattr(training, "python_text", lambda: texts)
    sizes = ("--layers", 1, "--heads", 2, "--d-model", 16, "--d-mlp", 16, "--vocabulary", 300)
    sizes += ("--length", 32, "--batch-size", 2, "--steps", 2, "--every", 1, "--threads", 1)
    folder, plot, film = tmp_path / "run", tmp_path / "run.png", tmp_path / "run.gif"
    arguments = ("theory", "text", folder, *sizes, "--plot", plot, "--animation", film)
    code, out, _ = call(*arguments)
    assert code == 0
    assert "strongest slash" in out
    assert plot.stat().st_size > 0
    assert film.read_bytes().startswith(b"GIF89a")
    code, out, err = call("theory", "text", folder, *sizes, "--resume", "--json")
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert [row["step"] for row in record["steps"]] == [0, 1, 2]
    assert record["settings"]["vocabulary"] == 300
    code, out, err = call("theory", "text", folder, *sizes)
    assert (code, out) == (2, "")
    assert "holds this run already" in err


def test_theory_predict(call):
    arguments = ("theory", "predict", "--length", 40, "--frequencies", "high", "--steps", 80)
    code, out, err = call(*arguments)
    assert code == 0, err
    assert "the slash score at Δ=1 passes 0.5" in out
    assert "seed 2: after " in out
    assert out.count("a slash forms at Δ=1") == 3
    code, out, _ = call(*arguments, "--cone", 0, "--seeds", 1)
    assert code == 0
    assert "seed 0: not within 80 steps; no slash forms; closed form: not within 80 steps" in out
    code, out, _ = call(*arguments, "--cone", 0, "--seeds", 1, "--json")
    none = {"step": None, "first_step": None, "offset": None, "final_offset": None}
    assert json.loads(out)["runs"][0]["slash"] == none
    code, out, _ = call(*arguments, "--seeds", 1, "--seed", 3, "--kappa", 0.3, "--json")
    record = json.loads(out)
    (run,) = record["runs"]
    assert (code, run["seed"], record["kappa"]) == (0, 3, 0.3)
    assert run["slash"]["step"] <= run["closed_form"]["step"] < 80
    assert len(run["rates"]) == 6
    assert run["history"][-1]["step"] == record["settings"]["steps"] == 80


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("predict", "--offset", 16), "beyond a segment"),
        (("predict", "--kappa", 2), "kappa is a number from 0 to 1"),
        (("train", "--cone", -1), "cone is a number from 0 to 2"),
        (("train", "--frequencies", ","), "no θ is left"),
        (("train", "--offset", 40), "beyond a segment"),
        (("train", "--checkpoint", "a.safetensors"), "give --seeds 1"),
        (("train", "--out", "a.txt"), "expected a name that ends in"),
        (("phase", "--rows", "cone"), "expected a knob and its values"),
        (("phase", "--rows", "cones=1"), "need one of the settings"),
        (("phase", "--resume"), "--resume goes with --out"),
    ],
)
def test_theory_refuses(call, arguments, said):
    code, out, err = call("theory", *arguments)
    assert (code, out) == (2, "")
    assert said in " ".join(err.split())


def test_emergence(call, tmp_path, capsys):
    for step in (1, 5):
        llama(seed=step).save_pretrained(tmp_path / "run" / f"checkpoint-{step}")
    capsys.readouterr()  # what saving printed
    out, plot = tmp_path / "run.parquet", tmp_path / "run.svg"
    arguments = ("emergence", tmp_path / "run", "--random-tokens", *SMALL)
    written = ("--measures", "rank, prefix", "--out", out, "--plot", plot, "--log-steps")
    code, printed, err = call(*arguments, *written)
    assert (code, err) == (0, "")
    assert "2 steps of run, 2 prompts of 24 tokens" in printed
    assert "when heads first reached κ = 0.1" in printed
    assert f"wrote {out}" in printed
    assert plot.read_text().startswith("<?xml")
    assert sp.Emergence.load(out).measures == ("slash", "rank", "prefix")
    code, printed, err = call(*arguments, *written, "--resume", "--json")
    record = json.loads(printed)
    assert [row["step"] for row in record["steps"]] == [1, 5]
    assert record["steps"][0]["loss"] is None
    assert record["first_steps"][0]["first"] in (1, 5)
    for more, message in (
        (written, "holds a run already; resume it (--resume"),
        (("--resume",), "--resume goes with --out"),
        (("--text", "a.txt"), "give --text or --random-tokens, not both"),
        (("--out", "run.csv"), "expected a name that ends in .parquet"),
        (("--measures", "bogus"), "unknown measure 'bogus'"),
        (("--kappa", 2), "kappa must be a score"),
        (("--device", "disk"), "--device disk is not for checkpoints"),
    ):
        code, printed, err = call(*arguments, *more)
        assert (code, printed, len(err.splitlines())) == (2, "", 1)
        assert message in err
    code, _, err = call("emergence", "EleutherAI/pythia-160m@step1000")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "cannot fetch EleutherAI/pythia-160m@step1000" in err


def test_scan_finds_lines(call, model, tmp_path):
    plot = tmp_path / "lines.png"
    sizes = ("-m", model, "--prompts", 4, "--max-tokens", 48, "--device", "cpu")
    code, out, err = call("scan", *sizes, "--lines", "--plot", plot)
    assert (code, err) == (0, "")
    assert "offsets each (natural text, seed 0)" in out
    assert plot.read_bytes().startswith(b"\x89PNG")
    record = json.loads(call("scan", *sizes, "--lines", "--json")[1])
    loaded = sp.load(model, device="cpu")
    scan = sp.scan(loaded, n_prompts=4, max_tokens=48, lines=True, moments=False)
    expected = scan.lines_to_dataframe().to_dict(orient="records")
    assert [row["offset"] for row in record["lines"]] == [row["offset"] for row in expected]
    code, _, err = call("scan", "-m", model, "--lines", "--prompts", 3)
    assert (code, err) == (2, "slashpatch: --lines needs at least 4 prompts; got --prompts 3\n")


def test_persistence(call, model, tmp_path):
    out, plot = tmp_path / "p.json", tmp_path / "p.svg"
    rest = ("--prompts", 4, "--max-tokens", 24, "--offsets", "0-3", "--kappa-random", 0.05)
    code, shown, err = call("persistence", "-m", model, *rest, "--out", out, "--plot", plot)
    assert (code, err) == (0, "")
    assert "on natural text, " in shown
    assert plot.read_text().startswith("<?xml")
    record = json.loads(call("persistence", "-m", model, *rest, "--json")[1])
    loaded = sp.load(model, device="cpu")
    sizes = {"n_prompts": 4, "max_tokens": 24, "offsets": range(4)}
    expected = sp.persistence(loaded, kappa_random=0.05, **sizes)
    assert len(record["effects"]) == len(expected.frame) == 2 * 4 * 4
    assert [row["name"] for row in record["effects"]] == expected.frame["name"].tolist()
    assert len(sp.Result.load(out).tables["counts"]) == 6
    code, _, err = call("persistence", "-m", model, "--kappa", 3)
    assert (code, err) == (2, "slashpatch: kappa must be a score from 0 to 1; got 3.0\n")


def test_dose_shows_a_curve_and_goes_on(call, model, tmp_path):
    out, plot = tmp_path / "dose.json", tmp_path / "dose.png"
    edit = ("dose", "ScaleOffsets(L0H0, 1, {})", "0:1:0.5", "-m", model, "--prompts", 4)
    code, shown, err = call(*edit, "--max-tokens", 12, "--out", out, "--plot", plot)
    assert (code, err) == (0, "")
    assert "effect at each dose of ScaleOffsets(L0H0, 1, {})" in shown
    assert "rank correlation" in shown
    assert plot.stat().st_size > 0
    code, again, _ = call(*edit, "--max-tokens", 12, "--out", out, "--resume", "--json")
    assert [row["dose"] for row in json.loads(again)["effects"]] == [0, 0.5, 1]


def test_ablations_are_one_table(call, model, tmp_path):
    file = tmp_path / "c.safetensors"
    few = ("--prompts", 4, "--fit-prompts", 3, "--steps", 2, "--max-tokens", 12)
    code, shown, err = call("ablations", "L0H0", "-m", model, *few, "--constants", file, "--json")
    assert (code, err) == (0, "")
    edits = [row["edit"] for row in json.loads(shown)["effects"]]
    assert len(edits) == 4
    assert edits[-1] == f"AblateHeads(L0H0, mode='optimal', constants={str(file)!r})"
    code, shown, _ = call("measure", "-m", model, "-e", edits[-1], "--prompts", 3)
    assert code == 0


def test_circuit_shows_shares(call, model, tmp_path):
    few = ("--prompts", 4, "--max-tokens", 12, "--random-sets", 2, "--subsets", 2)
    out, plot = tmp_path / "circuit.json", tmp_path / "circuit.svg"
    members = ("circuit", "L0H0, L1H2@1", "-m", model, "--metric", "kl", *few)
    code, shown, err = call(*members, "--out", out, "--plot", plot)
    assert (code, err) == (0, "")
    for word in ("faithfulness", "left without", "incompleteness", "L1H2@1", "random sets"):
        assert word in shown
    code, again, _ = call(*members, "--out", out, "--resume", "--json")
    assert json.loads(again)["kind"] == "circuit"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dose", "KnockOut(L0H0, 1)", "1"), "with {} in the place of the dose"),
        (("dose", "KnockOut(L0H0, {})", "x"), "doses are typed as 0:2:0.25"),
        (("dose", "KnockOut(L0H0, {})", "1", "--resume"), "--resume goes with --out"),
        (("ablations", "L0H0", "--metric", "top1", "-m", "MODEL"), "no gradient"),
        (("ablations", "L0H0", "--constants", "c.pt"), "expected a name that ends in .safetensors"),
        (("circuit", "L0H0", "--mode", "optimal", "-m", "MODEL"), "go together"),
        (("circuit", "L0H0@x", "-m", "MODEL"), "a diagonal such as L16H0@1"),
        (
            ("circuit", "L0H0", "--mode", "optimal", "--constants", "absent.safetensors"),
            "no file",
        ),
    ],
)
def test_bad_doses_ablations_and_circuits(call, model, arguments, message):
    code, out, err = call(*(model if word == "MODEL" else word for word in arguments))
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert message in err
