"""What a model needs of memory, what there is, and refusals of what does not fit."""

import json
import re
import sys

import psutil
import pytest
import torch

import slashpatch as sp
from slashpatch.bridge import memory
from slashpatch.errors import ModelError, SlashpatchError, TooLargeError
from slashpatch.scanning.moment_sums import MomentSums

from ..tiny import llama, random_tokens, tokenizer
from ..zoo import FAMILIES, build

GB = 10**9


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    llama(seed=0, layers=3).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def huge(tmp_path):
    """The configuration of a model of 70 billion parameters, without weights."""
    config = llama().config.to_dict() | {
        "hidden_size": 8192, "head_dim": 128, "intermediate_size": 28672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "vocab_size": 128256, "max_position_embeddings": 131072, "dtype": "bfloat16",
        "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture
def room(monkeypatch):
    """Says how many bytes each device has."""

    def set_to(**rooms):
        def available(device="cpu"):
            return rooms["cuda" if isinstance(device, int) else device.partition(":")[0]]

        monkeypatch.setattr(memory, "available_memory", available)

    return set_to


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tie", [True, False])
def test_weights_are_those_of_the_model(tmp_path, dtype, tie):
    llama(seed=0, tie_word_embeddings=tie).save_pretrained(tmp_path)
    hf_model = llama(seed=0, tie_word_embeddings=tie).to(getattr(torch, dtype))
    expected = sum(x.numel() * x.element_size() for x in hf_model.parameters())
    found = sp.memory_needed(tmp_path, dtype)
    buffers = sum(x.numel() * x.element_size() for x in hf_model.buffers())
    assert expected <= found.weights <= expected + 2 * buffers  # frequencies stay in float32
    assert found.mapped == (found.weights if dtype == "float32" else 0)
    assert str(found).startswith(f"{tmp_path.name} in {dtype}: 0 MB of weights")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kv_cache_is_that_of_a_pass(tmp_path, family):
    if FAMILIES[family].refused:
        pytest.skip("the model is refused")
    hf_model = build(FAMILIES[family])
    hf_model.save_pretrained(tmp_path)
    with torch.no_grad():
        cache = hf_model(random_tokens(1, 3), use_cache=True).past_key_values
    expected = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    assert sp.memory_needed(tmp_path, n_tokens=3).kv_cache == expected


def test_a_model_without_attention_is_refused_by_name(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=16, hidden_size=8, state_size=2, num_hidden_layers=1)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    for read in (sp.memory_needed, sp.load):
        with pytest.raises(ModelError, match="MambaForCausalLM has no attention heads"):
            read(tmp_path)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_sums_are_those_of_a_scan(tmp_path, kv_heads):
    hf_model = llama(seed=0, kv_heads=kv_heads)
    hf_model.save_pretrained(tmp_path)
    model = sp.load(hf_model)
    moments = MomentSums(model, sp.bridge.read(model), 64)
    scan = sp.scan(model, random_tokens(1, 20), range(16))
    kept = [*moments.sums.values(), moments.logit_rows, scan.sums, scan.squares]
    assert sp.memory_needed(tmp_path).sums == sum(x.nbytes for x in kept)


def test_a_model_of_70_billion_parameters(huge):
    needed = sp.memory_needed(huge, "bfloat16", n_tokens=8192)
    assert needed.weights == pytest.approx(141.1e9, rel=1e-3)
    assert needed.kv_cache == 2 * 80 * 8 * 128 * 8192 * 2
    assert "141.1 GB of weights (141.1 GB of them mapped from file on a CPU)" in str(needed)
    assert sp.memory_needed(huge).weights == pytest.approx(2 * needed.weights, rel=1e-3)


def test_what_does_not_fit_is_refused_before_weights_are_read(huge, room):
    """There are none: reading them would be another error."""
    room(cpu=16 * GB, cuda=80 * GB)
    with pytest.raises(TooLargeError) as error:
        sp.load(huge, device="cpu")
    assert isinstance(error.value, (ModelError, MemoryError))
    message = str(error.value)
    for part in (
        "in float32: 282.2 GB of weights", "of KV cache for a prompt of 2,048 tokens",
        "of sums for a scan", "282.2 GB of weights do not fit cpu, which has 16.0 GB",
        "dtype='bfloat16'", "device_map='auto'", "device_map='disk'",
        "max_memory={'cpu': '263GiB'}",
    ):  # fmt: skip
        assert part in message
    with pytest.raises(TooLargeError, match=r"141\.1 GB of weights do not fit cuda, .* 80\.0 GB"):
        sp.load(huge, device="cuda", dtype="bfloat16")
    room(cpu=16 * GB, cuda=300 * GB)
    with pytest.raises(TooLargeError, match="do not fit cpu"):  # through which they are loaded
        sp.load(huge, device="cuda")


def test_maps_are_refused_by_device(huge, room, monkeypatch):
    beside = dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head"), "disk")
    room(cpu=16 * GB, cuda=80 * GB)
    with pytest.raises(TooLargeError, match=r"273\.8 GB of weights do not fit cpu"):
        sp.load(huge, device_map=beside | {"model.layers": "cpu"})
    with pytest.raises(TooLargeError, match=r"do not fit 0, which has 80\.0 GB"):
        sp.load(huge, device_map={"model": 0, "lm_head": "disk"})
    with pytest.raises(TooLargeError, match=r"do not fit cpu, which has 10\.7 GB"):
        sp.load(huge, device_map={"": "cpu"}, max_memory={"cpu": "10GiB"})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(TooLargeError, match=r"the GPUs have 160\.0 GB\..*not on both at once"):
        sp.load(huge, device_map="auto")


@pytest.mark.parametrize(
    "options",
    [
        {"device": "cpu", "dtype": "bfloat16"},  # mapped from its file
        {"device_map": "disk"},
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}, "max_memory": {"cpu": "300GiB"}},
    ],
)
def test_what_may_fit_is_not_refused(huge, room, options):
    room(cpu=16 * GB)
    with pytest.raises(SlashpatchError) as error:
        sp.load(huge, **options)
    assert not isinstance(error.value, TooLargeError)  # but an error of the missing files
    assert re.search("no file named|safetensors", str(error.value))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_in_their_own_dtype_stay_in_their_file(directory):
    """Which is why they are not counted: the system may drop them from memory."""
    model = sp.load(directory, device="cpu")
    with open("/proc/self/maps", encoding="utf-8") as maps:
        ranges = [
            tuple(int(end, 16) for end in line.split()[0].split("-"))
            for line in maps
            if str(directory) in line
        ]
    weight = model.original_model.model.layers[1].mlp.original_component.up_proj.weight
    assert any(start <= weight.data_ptr() < stop for start, stop in ranges)


def test_experts_are_copied_while_they_are_loaded(tmp_path):
    build(FAMILIES["Mixtral"]).save_pretrained(tmp_path)
    assert sp.memory_needed(tmp_path).mapped == 0


@pytest.mark.usefixtures("unchecked")
def test_models_that_cannot_be_read(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot read"):
        sp.memory_needed(tmp_path)
    with pytest.raises(ModelError, match="no such file or directory"):
        sp.memory_needed("./absent")


def test_what_this_process_can_use():
    found = sp.bridge.memory.available_memory()
    assert 0 < found <= psutil.virtual_memory().total + psutil.swap_memory().total


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(str(text))


def test_control_groups_version_2(tmp_path):
    """Limits of the groups above count too; cached files do not count as used."""
    write(tmp_path / "proc/self", cgroup="0::/pod/box\n")
    group = tmp_path / "sys/fs/cgroup"
    write(group, memory__stat="anon 5\n")  # the topmost has no limit
    stat = "anon 600\nactive_file 100\ninactive_file 200\n"
    write(group / "pod", memory__max=1000, memory__current=900, memory__stat=stat)
    write(group / "pod/box", memory__max="max", memory__current=900, memory__stat=stat)
    assert memory._cgroup_rooms(tmp_path, 0) == [400]
    write(group / "pod/box", memory__max=700, memory__swap__max=50, memory__swap__current=20)
    assert memory._cgroup_rooms(tmp_path, 1000) == [130, 400]
    assert memory._cgroup_rooms(tmp_path, 10) == [110, 400]
    write(group / "pod/box", memory__max=100, memory__swap__max=0)
    assert memory._cgroup_rooms(tmp_path, 1000) == [0, 400]


def test_control_groups_version_1(tmp_path):
    write(tmp_path / "proc/self", cgroup="5:cpu:/box\n4:memory:/box\n0::/\n")
    group = tmp_path / "sys/fs/cgroup/memory"
    stat = "cache 1\ntotal_active_file 100\ntotal_inactive_file 200\n"
    names = {"memory__usage_in_bytes": 900, "memory__stat": stat}
    write(group, memory__limit_in_bytes=2**63 - 4096, **names)
    write(group / "box", memory__limit_in_bytes=1000, **names)
    assert memory._cgroup_rooms(tmp_path, 1000) == [400]


def test_systems_without_control_groups(tmp_path):
    assert memory._cgroup_rooms(tmp_path, 0) == []
    write(tmp_path / "proc/self", cgroup="0::/gone\n")
    assert memory._cgroup_rooms(tmp_path, 0) == []


def test_a_container_with_less_than_the_host(monkeypatch):
    monkeypatch.setattr(memory, "_cgroup_rooms", lambda root, swap: [5 * GB // 10])
    assert memory.available_memory() == GB // 2
    assert memory.stated_or_limited("auto", None) == {"cpu": 45 * GB // 100}
    assert memory.stated_or_limited("auto", {"cpu": 7}) == {"cpu": 7}
    assert memory.stated_or_limited({"": "disk"}, None) is None
    monkeypatch.setattr(memory, "_cgroup_rooms", lambda root, swap: [])
    assert memory.stated_or_limited("auto", None) is None
