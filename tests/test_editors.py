from dataclasses import replace

import pytest
import torch

from unforget.core.metrics import rms
from unforget.errors import UsageError
from unforget.files import images
from unforget.surrogate.canvas import Canvas, box_mask, ellipse_mask
from unforget.surrogate.editors import Blur, Donor, Pixelate, RePaint, SDEdit, check
from unforget.surrogate.ranking import Candidate, rank

FAST = {"sdedit": SDEdit(seeds=2, steps=5), "repaint": RePaint(seeds=2, steps=6, jump_length=2, jump_n_sample=2)}
EDITORS = [*FAST.values(), Donor(), Blur(), Pixelate()]


@pytest.fixture
def canvas(tiny):
    g = torch.Generator().manual_seed(0)
    target, donor = images.from_pil(images.to_pil(torch.rand(3, 16, 16, generator=g) * 2 - 1)), torch.zeros(3, 16, 16)
    mask = torch.zeros(1, 16, 16)
    mask[:, 4:12, 4:12] = 1
    return Canvas(tiny, target, mask, donor, seed=3)


@pytest.mark.parametrize("editor", EDITORS, ids=lambda e: e.kind)
def test_an_edit_stays_inside_the_mask_and_in_range(editor, canvas):
    for candidate in editor(canvas):
        assert candidate.image.shape == canvas.target.shape
        assert candidate.image.abs().max() <= 1
        outside = (1 - canvas.mask).bool().expand(3, -1, -1)
        torch.testing.assert_close(candidate.image[outside], canvas.target[outside])
        assert not torch.equal(candidate.image, canvas.target)


@pytest.mark.parametrize("editor", FAST.values(), ids=lambda e: e.kind)
def test_the_same_seed_makes_the_same_edits(editor, canvas):
    first, again = editor(canvas), editor(canvas)
    assert all(torch.equal(a.image, b.image) for a, b in zip(first, again, strict=True))
    assert len({c.label for c in first}) == len(first)
    assert not torch.equal(first[0].image, first[1].image)


def test_masks():
    box = box_mask((2, 1, 3, 4), 8, 10)
    assert box.shape == (1, 8, 10)
    assert box[0, 1:5, 2:5].min() == 1
    assert box.sum() == 12
    for outside in ((8, 0, 3, 1), (-1, 0, 2, 2), (0, 0, 0, 1), (0, 6, 1, 3)):
        with pytest.raises(UsageError, match="leaves the 10x8"):
            box_mask(outside, 8, 10)
    ellipse = ellipse_mask(16, 16)[0]
    assert ellipse[8, 8] == 1
    assert ellipse[0, 0] == 0
    assert ((ellipse > 0) & (ellipse < 1)).any()


def test_sdedit_moves_farther_the_stronger_it_is(canvas):
    whole = Canvas(canvas.family, canvas.target, torch.ones(1, 16, 16))
    weak, strong = SDEdit(strengths=(0.05, 0.9), seeds=1, steps=20)(whole)
    assert rms(weak.image, canvas.target) < rms(strong.image, canvas.target)


def test_a_donor_must_be_given(canvas):
    with pytest.raises(UsageError, match="needs a picture"):
        check(Donor(), Canvas(canvas.family, canvas.target, canvas.mask))


def test_ranking_puts_another_instance_first_and_the_target_last(canvas):
    near, copy = canvas.target * 0.6, canvas.target.clone()
    far = -canvas.target
    ranked = rank([Candidate(copy, "copy"), Candidate(far, "far"), Candidate(near, "near")], canvas, distance=0.15)
    assert [c.label for c in ranked] == ["near", "far", "copy"]
    assert [c.accepted for c in ranked] == [True, True, False]
    assert ranked[-1].distance == 0


def test_another_background_is_not_another_instance(canvas):
    flat = canvas.target * 0.7 + 0.3
    (ranked,) = rank([Candidate(flat, "lighter")], canvas, distance=0.2)
    assert ranked.distance > 0.2
    assert ranked.redrawn == pytest.approx(0.3, abs=1e-5)  # only the contrast fell
    assert not ranked.accepted


def test_whom_the_base_draws_already_is_no_surrogate(canvas):
    edit = -canvas.target
    free, taken = (
        rank([Candidate(edit, "edit")], replace(canvas, drawn=drawn), distance=0.2)[0]
        for drawn in (None, torch.stack([edit + 0.05, canvas.target]))
    )
    assert free.accepted
    assert not taken.accepted
    assert taken.familiar == pytest.approx(0.05, abs=1e-4)


def test_a_surrogate_among_the_others_has_fewer_strays(canvas):
    target = canvas.target
    g = torch.Generator().manual_seed(1)
    away = torch.rand(target.shape, generator=g) - 0.5
    drawn = torch.stack([target + away + 0.02 * torch.randn(target.shape, generator=g) for _ in range(4)])
    ranked = rank(
        [Candidate(target + 0.8 * away, "among"), Candidate(target - 0.8 * away, "opposite")],
        replace(canvas, drawn=drawn), distance=0.1, near_copy=0.01,
    )  # fmt: skip
    strays = {c.label: c.strays for c in ranked}
    assert strays["among"] < strays["opposite"]
    assert all(0 <= s <= 1 for s in strays.values())


def test_ranking_does_not_accept_a_blur(canvas):
    flat = torch.zeros_like(canvas.target)
    (ranked,) = rank([Candidate(flat, "flat")], canvas, distance=0.1)
    assert ranked.quality < 0.1
    assert not ranked.accepted


def test_the_target_in_another_place_is_no_surrogate_under_a_prompt(sd3):
    target = torch.full((3, 16, 16), 0.8)
    target[:, 4:12, 3:7], target[:, 4:12, 9:13] = -1.0, 0.0
    moved, other = target.roll(1, 2), target.flip(2)
    row = int(sd3.prompt_ids(["a red square"])[0])
    for prompt_ids, refused in ((0, False), (row, True)):
        canvas = Canvas(sd3, target, torch.ones(1, 16, 16), prompt_id=prompt_ids)
        ranked = {
            c.label: c for c in rank([Candidate(moved, "moved"), Candidate(other, "other")], canvas, distance=0.1)
        }
        assert (ranked["moved"].moved < 0.16) == refused
        assert ranked["moved"].accepted != refused
        assert ranked["other"].accepted
