"""What was made once is read again, and a cache is only a cache."""

import torch

from unforget.files import cache


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


def test_figures_are_made_once_and_a_damaged_or_unwritable_cache_stops_nothing(tmp_path, monkeypatch):
    made = []

    def make():
        made.append(1)
        return {"floor": 0.25}

    monkeypatch.setenv("UNFORGET_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        assert cache.cached_figures(["control", 1], make) == {"floor": 0.25}
    assert len(made) == 1
    for content in ("[1]", "{", '{"floor": "far"}'):
        next(cache.cache_folder().iterdir()).write_text(content)
        assert cache.cached_figures(["control", 1], make) == {"floor": 0.25}
    assert len(made) == 4
    (tmp_path / "file").touch()
    monkeypatch.setenv("UNFORGET_CACHE", str(tmp_path / "file" / "cache"))
    assert cache.cached_figures(["control", 1], make) == {"floor": 0.25}


def test_the_first_run_and_the_later_ones_get_the_same_images_in_the_same_layout():
    def make():
        return torch.rand(3, 4, 5, 3, generator=torch.Generator().manual_seed(0)).permute(0, 3, 1, 2) * 2 - 1

    first, again = (cache.cached(["test", "layout"], make) for _ in range(2))
    assert torch.equal(first, again)
    assert first.stride() == again.stride()
