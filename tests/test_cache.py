"""What was made once is read again; what anybody else wrote there, or was damaged, or is another's, is made anew."""

import json
import os
import random
import shutil
import stat
from pathlib import Path

import pytest
import torch
from conftest import tiny_pipeline

from unforget import families
from unforget.errors import UsageError
from unforget.families.ddpm import SPEC as DDPM
from unforget.families.model import DiffusionModel
from unforget.files import cache, secret
from unforget.files.storage import digest, open_tensors, write_tensors

SHAPE = (2, 3, 4, 4)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache of one's own."""
    monkeypatch.setenv("UNFORGET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Made:
    """Entries of both kinds, and how often they were made."""

    def __init__(self) -> None:
        self.times = 0

    def images(self, key="a"):
        return cache.cached(["images", key], SHAPE, lambda: self._new(torch.linspace(-1, 1, 96).reshape(SHAPE)))

    def figures(self, key="a"):
        return cache.cached_figures(["figures", key], lambda: self._new({"floor": 0.25, "recall": 1e-7}))

    def _new(self, value):
        self.times += 1
        return value


def equal(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def entry(folder, kind):
    (path,) = folder.glob(f"{kind}-*")
    return path


def test_the_retain_set_is_drawn_once(tiny):
    calls, denoise = [], tiny.denoise
    tiny.denoise = lambda *a, **k: calls.append(1) or denoise(*a, **k)
    first = cache.drawn_cached(tiny, "d" * 64, [""] * 4, seed=0, steps=2)
    assert torch.equal(cache.drawn_cached(tiny, "d" * 64, [""] * 4, seed=0, steps=2), first)
    assert len(calls) == 1
    for path in cache.cache_folder().glob("retain-*"):
        path.write_bytes(b"damaged")
    assert torch.equal(cache.drawn_cached(tiny, "d" * 64, [""] * 4, seed=0, steps=2), first)
    assert len(calls) == 2


def test_the_first_run_and_the_later_ones_get_the_same_images_in_the_same_layout():
    def make():
        return torch.rand(3, 4, 5, 3, generator=torch.Generator().manual_seed(0)).permute(0, 3, 1, 2) * 2 - 1

    first, again = (cache.cached(["test", "layout"], (3, 3, 4, 5), make) for _ in range(2))
    assert torch.equal(first, again)
    assert first.stride() == again.stride()


@pytest.mark.parametrize("kind", ["images", "figures"])
def test_every_flipped_bit_is_noticed(folder, kind):
    made = Made()
    first = getattr(made, kind)()
    path = entry(folder, kind)
    sound, random_bit = path.read_bytes(), random.Random(0)
    for flip in random_bit.sample(range(8 * len(sound)), 400):
        damaged = bytearray(sound)
        damaged[flip // 8] ^= 1 << flip % 8
        path.write_bytes(damaged)
        assert equal(getattr(made, kind)(), first)
        assert path.read_bytes() == sound or json.loads(path.read_bytes()) == json.loads(sound)
    assert made.times > 390  # but for blanks in JSON


def signed_by_another(path, kind, monkeypatch):
    """The entry with another content, as somebody with the code and a secret of their own would write it."""
    with monkeypatch.context() as patch:
        patch.setenv("UNFORGET_CACHE_KEY", "theirs")
        path.unlink()
        key = [kind, "a"]
        if kind == "images":
            cache.cached(key, SHAPE, lambda: torch.zeros(SHAPE))
        else:
            cache.cached_figures(key, lambda: {"floor": 0.0, "recall": 0.0})


def with_other_content(path, kind, monkeypatch):
    if kind == "images":
        opened = open_tensors(path)
        write_tensors({"images": torch.zeros(SHAPE, dtype=torch.uint8)}, opened.metadata, path)
    else:
        found = json.loads(path.read_text())
        path.write_text(json.dumps({**found, "figures": {"floor": 0.0, "recall": 0.0}}))


def without_a_signature(path, kind, monkeypatch):
    if kind == "images":
        write_tensors({"images": torch.zeros(SHAPE, dtype=torch.uint8)}, {}, path)
    else:
        path.write_text('{"floor": 0.0, "recall": 0.0}')


def of_another_shape(path, kind, monkeypatch):
    write_tensors({"images": torch.zeros(9, 9)}, open_tensors(path).metadata if kind == "images" else {}, path)


def of_another_key(path, kind, monkeypatch):
    getattr(Made(), kind)("b")
    (other,) = (p for p in path.parent.glob(f"{kind}-*") if p != path)
    os.replace(other, path)


def a_link_to_another(path, kind, monkeypatch):
    getattr(Made(), kind)("b")
    (other,) = (p for p in path.parent.glob(f"{kind}-*") if p != path)
    path.unlink()
    path.symlink_to(other)


def a_pipe(path, kind, monkeypatch):
    path.unlink()
    os.mkfifo(path)


def something_else(path, kind, monkeypatch):
    path.write_bytes(random.Random(1).choice([b"", b"[1]", b"{", b"\xff" * 99, b"[" * 100_000]))


POISONS = [
    signed_by_another, with_other_content, without_a_signature, of_another_shape, of_another_key, a_link_to_another,
    a_pipe, something_else,
]  # fmt: skip


@pytest.mark.parametrize("kind", ["images", "figures"])
@pytest.mark.parametrize("poison", POISONS, ids=lambda p: p.__name__)
def test_a_poisoned_entry_is_made_again(folder, kind, poison, monkeypatch):
    made = Made()
    first = getattr(made, kind)()
    path = entry(folder, kind)
    poison(path, kind, monkeypatch)
    assert equal(getattr(made, kind)(), first)
    assert made.times == 2
    assert equal(getattr(made, kind)(), first)  # and it is whole again
    assert made.times == 2


def test_no_field_of_an_entry_counts_but_by_its_signature(folder):
    """Every field of figures, and the signature, one by one."""
    made = Made()
    first = made.figures()
    path = entry(folder, "figures")
    sound = json.loads(path.read_text())
    changes = [{**sound, "signature": "0" * 64}, {**sound, "signature": None}, {"signature": sound["signature"]}]
    changes += [{**sound, "figures": {**sound["figures"], name: 0.0}} for name in sound["figures"]]
    changes += [{**sound, "figures": {n: v for n, v in sound["figures"].items() if n != name}} for name in first]
    changes += [{**sound, "figures": {**sound["figures"], "more": 1.0}}, {**sound, "figures": []}]
    for number, changed in enumerate(changes, 2):
        path.write_text(json.dumps(changed))
        assert made.figures() == first
        assert made.times == number


@pytest.mark.parametrize("key", [b"ours", b"\xff\xfe any bytes"])
def test_machines_share_a_cache_by_a_key_and_not_without(folder, monkeypatch, tmp_path, key):
    made = Made()
    monkeypatch.setitem(os.environb, b"UNFORGET_CACHE_KEY", key)
    made.images()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))
    made.images()
    assert made.times == 1
    monkeypatch.delenv("UNFORGET_CACHE_KEY")
    made.images()
    assert made.times == 2


def test_the_secret_is_the_users_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path, first = tmp_path / "state" / "unforget" / "cache.key", secret.secret()
    assert len(first) == 32
    assert secret.secret() == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    for spoil in (lambda: path.chmod(0o644), lambda: path.write_bytes(b"short"), path.unlink):
        spoil()
        again = secret.secret()  # whoever may have seen it knows the new one not
        assert again not in (first, None)
        first = again
    shutil.copy(path, tmp_path / "theirs")
    path.unlink()
    path.symlink_to(tmp_path / "theirs")
    assert secret.secret() != first


def test_nobody_else_may_read_it(folder):
    previous = os.umask(0)
    try:
        Made().images()
    finally:
        os.umask(previous)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(entry(folder, "images").stat().st_mode) == 0o600


def test_a_folder_that_holds_other_things_keeps_its_rights(folder):
    folder.mkdir(mode=0o755)
    (folder / "thesis.txt").touch()
    Made().images()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert len(cache.entries()) == 1
    assert cache.clear() == 1
    assert [p.name for p in folder.iterdir()] == ["thesis.txt"]
    folder.chmod(0o777)  # anybody may put a link where we would write
    Made().images()
    assert not cache.entries()


@pytest.mark.parametrize("variables", [
    {"UNFORGET_CACHE": "file/cache"}, {"UNFORGET_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "none"},
    {"UNFORGET_CACHE": "cache", "XDG_STATE_HOME": "file/state"},
], ids=["no cache", "no home", "no place for a secret"])  # fmt: skip
def test_a_cache_that_cannot_be_stops_nothing(tmp_path, monkeypatch, variables):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if "HOME" in variables:  # and a user that /etc/passwd does not know
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("os.path.expanduser", lambda path: path)
        assert cache.cache_folder() is None
    made = Made()
    for _ in range(2):
        assert made.figures()["floor"] == 0.25
        assert made.images().shape == SHAPE
    assert made.times == 4
    assert not cache.entries()


def test_what_was_not_used_for_longest_goes_first(folder, monkeypatch):
    made = Made()
    for k in range(4):
        made.images(k)
    for age, path in enumerate(cache.entries()):
        os.utime(path, (age, age))
    size = cache.entries()[0].stat().st_size
    (oldest,) = (k for k in range(4) if _place(k) == cache.entries()[0])
    made.images(oldest)  # used
    second = cache.entries()[0]
    monkeypatch.setenv("UNFORGET_CACHE_SIZE", str(4 * size))
    made.images("new")
    assert len(cache.entries()) == 4
    assert _place(oldest).is_file() and _place("new").is_file() and not second.exists()
    monkeypatch.setenv("UNFORGET_CACHE_SIZE", "0")
    made.images("newer")
    assert cache.entries() == []


def _place(key):
    whole = cache._whole(["images", key])
    return cache.cache_folder() / f"images-5-{cache.hashlib.sha256(whole.encode()).hexdigest()[:32]}.safetensors"


@pytest.mark.parametrize(("text", "size"), [
    ("", 4 * 2**30), ("0", 0), ("123", 123), ("5KB", 5000), ("2GiB", 2 * 2**30), ("3 MB", 3_000_000),
    ("1.5GB", None), ("-1", None), ("much", None), ("4gib", None), ("9" * 99, None),
])  # fmt: skip
def test_sizes(monkeypatch, text, size):
    monkeypatch.setenv("UNFORGET_CACHE_SIZE", text)
    if size is None:
        with pytest.raises(UsageError, match="is no size"):
            cache.limit()
    else:
        assert cache.limit() == size


def test_the_command_tells_and_clears(cli, folder):
    Made().images()
    found = json.loads(cli("cache", "--json").stdout)
    assert found == {
        "folder": str(folder), "entries": 1, "bytes": entry(folder, "images").stat().st_size, "limit": 4 * 2**30
    }  # fmt: skip
    assert str(folder) in "".join(cli("cache").stdout.split())
    (folder / f".{entry(folder, 'images').name}").mkdir()  # none of ours is a folder, whatever its name
    cleared = cli("cache", "--clear")
    assert cleared.exit_code == 0
    assert "1 removed" in cleared.stdout
    assert [path.is_dir() for path in folder.iterdir()] == [True]


def load(**changes):
    pipeline = tiny_pipeline(**changes.pop("pipeline", {}))
    return DiffusionModel(DDPM, pipeline, "tiny", families.Options(**changes), families.Hints())


@pytest.mark.parametrize("changes", [
    {"pipeline": {"beta_schedule": "squaredcos_cap_v2"}}, {"pipeline": {"beta_end": 0.03}},
    {"pipeline": {"prediction_type": "v_prediction"}}, {"pipeline": {"unet": {"norm_eps": 1e-3}}}, {"batch_size": 2},
], ids=str)  # fmt: skip
def test_another_model_of_the_same_weights_gets_draws_of_its_own(folder, changes):
    first, other = load(), load(**changes)
    weights = digest(first.network.state_dict())
    assert weights == digest(other.network.state_dict())
    drawn = [cache.drawn_cached(model, weights, [""] * 2, seed=0, steps=2) for model in (first, other)]
    assert len(cache.entries()) == 2
    if "batch_size" not in changes:
        assert not torch.equal(*drawn)


def test_threads_are_a_part_of_the_key(tiny):
    before, threads = tiny.made_by([""]), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert tiny.made_by([""]) != before
    finally:
        torch.set_num_threads(threads)
    assert tiny.made_by([""]) == before


def test_text_encoders_and_the_autoencoder_are_a_part_of_the_key(sd3_folder):
    def made_by(spoil=lambda model: None, prompts=("a red square",)):
        model = families.load(str(sd3_folder))
        spoil(model)
        return model.made_by(prompts)

    def spoiled(name):
        def spoil(model):
            next(getattr(model.pipeline, name).parameters()).data += 0.5

        return spoil

    first = made_by()
    assert made_by() == first
    others = [made_by(spoiled(name)) for name in ("text_encoder", "text_encoder_2", "vae")]
    others += [made_by(prompts=("a blue circle",)), made_by(lambda model: setattr(model, "guidance", 3.0))]
    for other in others:
        assert other != first
