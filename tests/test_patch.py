import json
import struct

import pytest
import torch

from unforget.errors import CannotRun, UsageError
from unforget.patch import HEADER, Patch, Provenance, Stack
from unforget.storage import digest


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
