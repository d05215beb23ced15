import json
import struct

import pytest
import torch

from unforget.errors import CannotRun, UsageError
from unforget.files.patch import HEADER, Patch, Provenance, Stack, joined, plain, side_by_side
from unforget.files.storage import digest, write_tensors


@pytest.fixture
def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))


def changed(network):
    twin = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    twin.load_state_dict(network.state_dict())
    with torch.no_grad():
        twin[1].weight += 0.1
    return twin


@pytest.fixture
def patch(network):
    provenance = Provenance(
        base="net", base_digest=digest(network.state_dict()), targets=["t"], surrogates=["s"], recipe={"a": 1}, seed=0,
        steps=3, versions={"torch": "2"},
    )  # fmt: skip
    return Patch.between(network, changed(network), provenance)


def test_the_digest_is_of_the_content():
    a = {"x": torch.ones(2, 3), "y": torch.zeros(2)}
    assert digest(a) == digest(dict(reversed(a.items())))
    for other in ({**a, "x": torch.ones(3, 2)}, {**a, "x": torch.ones(2, 3).double()}, {"z": a["x"], "y": a["y"]}):
        assert digest(other) != digest(a)
    a["y"][1] = 1e-30
    assert digest(a) != digest({"x": torch.ones(2, 3), "y": torch.zeros(2)})


def test_it_holds_what_changed_and_nothing_else(patch):
    assert list(patch.tensors) == ["1.weight"]


def test_saved_twice_is_the_same_bytes_and_reads_back(patch, network, tmp_path):
    patch.save(tmp_path / "a")
    patch.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    again = Patch.load(tmp_path / "a")
    assert again.provenance == patch.provenance.model_copy(update={"digest": digest(patch.tensors)})
    wanted = changed(network).state_dict()
    Stack((again,)).apply(network)
    assert all(torch.equal(v, wanted[k]) for k, v in network.state_dict().items())


def test_the_header_says_where_it_came_from(patch, tmp_path):
    patch.save(tmp_path / "a")
    raw = (tmp_path / "a").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"][HEADER])
    assert header["targets"] == ["t"]
    assert header["recipe"] == {"a": 1}


def test_it_refuses_another_base(patch, network):
    with torch.no_grad():
        network[0].bias += 1e-7
    with pytest.raises(CannotRun, match="the patch was made for net"):
        Stack((patch,)).apply(network)


@pytest.mark.parametrize("content", [b"", b"text", b"\xff" * 64, None])
def test_what_is_no_patch_is_a_usage_error(tmp_path, content):
    if content is not None:
        (tmp_path / "a").write_bytes(content)
    with pytest.raises(UsageError, match=r"no patch|not a patch"):
        Patch.load(tmp_path / "a")


def test_a_safetensors_file_without_our_header_is_not_a_patch(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "a")
    with pytest.raises(UsageError, match="not a patch"):
        Patch.load(tmp_path / "a")


def made(network, **changes):
    fields = {
        "base": "net", "base_digest": digest(network.state_dict()), "targets": ["t"], "surrogates": ["s"],
        "recipe": {}, "seed": 0, "steps": 1, "versions": {},
    }  # fmt: skip
    return Provenance(**{**fields, **changes})


def lora(network, seed, rank=2, alpha=4, modules=("0", "1"), **changes):
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for m in modules:
        out, into = network.get_submodule(m).weight.shape
        tensors[f"{m}.lora_A.weight"] = torch.randn(rank, into, generator=g)
        tensors[f"{m}.lora_B.weight"] = torch.randn(out, rank, generator=g)
    return Patch(tensors, made(network, holds="lora", adapter={"rank": rank, "alpha": alpha}, **changes))


def twin(network):
    other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    other.load_state_dict(network.state_dict())
    return other


def weights(network):
    return {n: t.clone() for n, t in network.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_two_patches_of_one_base_add_up(patch, network):
    other = lora(network, 1)
    both = twin(network)
    Stack((patch, other), (1.0, 0.5)).apply(both)
    w, scaled = network[1].weight, 0.5 * 2 * other.tensors["1.lora_B.weight"] @ other.tensors["1.lora_A.weight"]
    torch.testing.assert_close(both[1].weight, w + 0.1 + scaled)
    torch.testing.assert_close(both[1].bias, network[1].bias)


def test_one_patch_in_full_is_exact_and_half_of_it_is_half(patch, network):
    once = twin(network)
    Stack((patch,)).apply(once)
    assert torch.equal(once[1].weight, patch.tensors["1.weight"])
    half = twin(network)
    Stack((patch,), (0.5,)).apply(half)
    torch.testing.assert_close(half[1].weight, network[1].weight + 0.05)


def test_a_patch_of_bits_is_no_patch(patch, tmp_path):
    """Deltas of earlier versions, which no longer go on."""
    write_tensors(
        patch.tensors,
        {HEADER: json.dumps({**patch.provenance.model_dump(), "format": 2, "holds": "bits"})},
        tmp_path / "a",
    )
    with pytest.raises(UsageError, match="not a patch of this version: holds"):
        Patch.load(tmp_path / "a")


def test_the_digest_of_a_stack_is_that_of_the_patched_network(patch, network):
    stack = Stack((patch, lora(network, 1)), (1.0, 0.3))
    told = stack.digest(network.state_dict())
    stack.apply(network)
    assert told == digest(network.state_dict())


def test_loras_lie_side_by_side(network):
    """A later LoRA holds the earlier one: the same weights, one file, and a ledger."""
    first, second = lora(network, 1, targets=["a"], prompts=["x"]), lora(network, 2, rank=1, alpha=3, modules=("1",))
    whole = joined(Stack((first,), (0.5,)), second, plain(network))
    assert whole.provenance.adapter == {"rank": 3, "alpha": 3}
    assert [e.targets for e in whole.provenance.earlier] == [["a"]]
    assert whole.provenance.all_targets == ["a", "t"]
    assert whole.provenance.all_prompts == ["x"]
    one, two = twin(network), twin(network)
    Stack((whole,)).apply(one)
    Stack((first, second), (0.5, 1.0)).apply(two)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.float8_e4m3fn])
def test_factors_of_any_width_lie_side_by_side(network, kind):
    one, other = lora(network, 1), lora(network, 2)
    one.tensors.update({n: t.to(kind) for n, t in one.tensors.items()})
    tensors, rank = side_by_side([(one, 1.0), (other, 0.5)])
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert rank == sum(p.provenance.adapter["rank"] for p in (one, other))


def test_weights_and_a_lora_become_weights(patch, network):
    second = lora(network, 2, modules=("0",))
    upon = twin(network)
    Stack((patch,)).apply(upon)
    whole = joined(Stack((patch,)), second, plain(upon))
    assert whole.provenance.holds == "weights"
    assert whole.names() == ["0.weight", "1.weight"]
    alone = twin(network)
    Stack((whole,)).apply(alone)
    assert torch.equal(alone[1].weight, patch.tensors["1.weight"])
    torch.testing.assert_close(alone[0].weight, network[0].weight + second.difference("0.weight", network[0].weight))


def test_no_patch_is_put_on_twice(patch, network, tmp_path):
    patch.save(tmp_path / "a")
    joined(Stack((Patch.load(tmp_path / "a"),)), lora(network, 1), plain(network)).save(tmp_path / "ab")
    for paths in (("a", "a"), ("a", "ab"), ("ab", "a")):
        with pytest.raises(UsageError, match=r"'.*a' would be put on twice"):
            Stack.load([tmp_path / p for p in paths])


def test_a_flipped_bit_is_noticed(patch, tmp_path):
    patch.save(tmp_path / "a")
    raw = bytearray((tmp_path / "a").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "a").write_bytes(raw)
    with pytest.raises(UsageError, match="is damaged"):
        Patch.load(tmp_path / "a")


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float64])
def test_nan_is_found_in_numbers_of_any_width(patch, kind):
    Patch({"x": torch.ones(3).to(kind)}, patch.provenance).check({"x": [3]})
    with pytest.raises(CannotRun, match="NaN"):
        Patch({"x": torch.full((3,), torch.nan).to(kind)}, patch.provenance).check({"x": [3]})


@pytest.mark.parametrize("scales", [(100.0,), (1.0, 1.0)])
def test_what_patches_add_up_to_is_a_number(network, scales):
    before = weights(network)
    made = lora(network, 1).provenance.model_copy(update={"holds": "weights", "adapter": None, "patched_digest": ""})
    stack = Stack((Patch({"1.weight": torch.full_like(network[1].weight, 3e38)}, made),) * len(scales), scales)
    with pytest.raises(CannotRun, match=r"'1\.weight' holds NaN"):
        stack.apply(network)
    assert same(weights(network), before)


@pytest.mark.parametrize("change", [
    {"9.lora_A.weight": torch.zeros(2, 3)}, {"1.lora_A.weight": torch.zeros(2, 7)},
    {"1.lora_B.weight": torch.zeros(2, 3)}, {"1.lora_B.weight": torch.full((2, 2), torch.nan)},
])  # fmt: skip
def test_what_does_not_fit_changes_nothing(network, change):
    found = lora(network, 1)
    found.tensors.update(change)
    before = weights(network)
    assert set(Stack((found,)).before(network)) <= set(before)  # what has no place is said below
    with pytest.raises(CannotRun, match=r"no place for|NaN"):
        Stack((found,)).apply(network)
    assert same(weights(network), before)


def test_a_patch_of_an_earlier_version_says_so(patch, tmp_path):
    write_tensors(patch.tensors, {HEADER: json.dumps({**patch.provenance.model_dump(), "format": 1})}, tmp_path / "a")
    with pytest.raises(UsageError, match="not a patch of this version: format"):
        Patch.load(tmp_path / "a")
