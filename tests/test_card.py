"""The card of an export: what it says, what it never says, and that nothing a user wrote can break it."""

import dataclasses
import os
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from conftest import by_its_card, tiny_pipeline
from diffusers import StableDiffusion3Pipeline
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt  # rich brings it
from peft import LoraConfig, get_peft_model
from pipelines import tiny_sd3

from unforget.errors import UsageError
from unforget.exports import card
from unforget.exports.manifest import AppliedPatch, ExportManifest, Rounding, Verified, called
from unforget.families.ddpm import SPEC as DDPM
from unforget.families.sd3 import SPEC as SD3
from unforget.files.patch import LedgerEntry, Provenance
from unforget.files.storage import digest

BASE, PATCHED, WRITTEN, FILE = "b" * 64, "c" * 64, "d" * 64, "e" * 64
EVIL = (
    "x | y <script>alert(1)</script> <img src=x onerror=f()> [a](javascript:b) ![p](http://evil.test/p.png) `c` **d** "
    "\n---\nlicense: mit\n---\n\n# heading\n```\n</details> &lt; www.evil.test https://evil.test a@evil.test $e$ "
    "\\| \u202e\x1b[1m"
)
NAMES = ("thead", "tbody", "table", "tr", "th", "td", "h1", "h2", "p", "ul", "li", "code", "pre", "strong", "a", "img")


def provenance(**changes) -> Provenance:
    recipe = {
        "objective": {"kind": "posterior-swap", "weighting": {"kind": "clean-space", "cap": 20.0}},
        "surgery": {"kind": "project"}, "train": "bottleneck", "learning_rate": 1e-4,
    }  # fmt: skip
    first = Provenance(
        base="/home/someone/models/faces", base_digest=BASE, patched_digest=PATCHED, digest=FILE, targets=["f00d1"],
        surrogates=["5a5a5"], recipe=recipe, seed=3, steps=240, versions={"torch": "2.13.0"},
    )  # fmt: skip
    return first.model_copy(update=changes)


def verified(**changes) -> Verified:
    first = Verified(
        verdict="forgotten", level="standard", summary="1 of 1 forgotten; the rest is kept.",
        versions={"torch": "2.13.0"}, targets={"f00d1": "forgotten"}, report_digest="a" * 64, candidate_digest=PATCHED,
    )  # fmt: skip
    return first.model_copy(update=changes)


def made(format="diffusers", parts=None, **changes) -> ExportManifest:
    first = ExportManifest(
        format=format, dtype="float32", base="faces", base_digest=BASE, patched_digest=PATCHED, digest=WRITTEN,
        patches=parts or [AppliedPatch(scale=1.0, provenance=provenance())],
        versions={"torch": "2.13.0", "diffusers": "0.35.1"},
    )  # fmt: skip
    return first.model_copy(update=changes)


def write(folder: Path, manifest: ExportManifest, family=DDPM, **more) -> str:
    folder.mkdir(exist_ok=True)
    path = card.write(folder, manifest, family, **more)
    assert path == folder / "README.md"
    return path.read_text(encoding="utf-8")


def metadata(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


class Page(HTMLParser):
    """What a browser would make of it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(ModelCard(text).text))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *a) for a in attrs]

    def handle_data(self, data):
        self.text += data


def test_it_says_what_was_forgotten_and_where_it_came_from(tmp_path):
    text = write(tmp_path, made(verified=verified()))
    page = Page(text).text
    assert "faces, made to forget 1 picture" in page
    for said in ("f00d1", BASE, PATCHED, WRITTEN, FILE, "a" * 64, "standard", "240", "diffusers 0.35.1, torch 2.13.0",
                 "objective posterior-swap, surgery project, train bottleneck, learning rate 0.0001",
                 "1 of 1 forgotten; the rest is kept.", "evidence, never a certificate"):  # fmt: skip
        assert said in page, said
    for never in ("/home/someone", "5a5a5", str(tmp_path), "Not verified", "rounding"):
        assert never not in text, never


def test_the_metadata_is_the_hubs(tmp_path):
    found = metadata(write(tmp_path, made("lora", base="sd3.5-medium"), SD3))
    assert found == {
        "base_model": "stabilityai/stable-diffusion-3.5-medium", "base_model_relation": "adapter",
        "library_name": "diffusers", "license": "other", "pipeline_tag": "text-to-image",
        "tags": ["unforget", "machine-unlearning", "lora"],
    }  # fmt: skip
    assert ModelCard.load(tmp_path / "README.md").data.base_model == found["base_model"]
    assert metadata(write(tmp_path, made()))["pipeline_tag"] == "unconditional-image-generation"


@pytest.mark.parametrize(
    ("base", "repo"),
    [
        ("google/ddpm-celebahq-256", "google/ddpm-celebahq-256"), ("o/n@refs/pr/1", "o/n"), ("faces", None),
        ("./o/n", None), ("/abs/o/n", None), ("~/models", None), ("o/n/m", None),
        ("o--p/n", None), ("o/n'\"", None), ("o/n@a\"b", None), (EVIL, None), ("", None), ("..", None),
    ],
)  # fmt: skip
def test_only_a_hub_id_is_a_base_model(tmp_path, base, repo):
    text = write(tmp_path / "out", made(base=called(base)))
    found = metadata(text)
    assert found.get("base_model") == repo
    assert ("base_model_relation" in found) == (repo is not None)
    assert "/abs" not in text and "~" not in text


def test_a_folder_here_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    text = write(tmp_path / "out", made(base=called("models/tiny")))
    assert "base_model" not in text and "models/" not in text
    assert "# tiny, made to forget" in text


def test_a_folder_with_an_alias_s_name_is_not_that_model(tmp_path):
    (tmp_path / "sdxl").mkdir()
    base = called(str(tmp_path / "sdxl"))
    assert called(base) == base == "./sdxl"
    assert "base_model" not in write(tmp_path / "out", made(base=base))
    assert called("sdxl") == "sdxl"


def test_nothing_a_user_wrote_breaks_it(tmp_path):
    odd = provenance(
        prompts=[EVIL], targets=[EVIL], digest=EVIL, versions={EVIL: EVIL}, adapter={"rank": 1, "alpha": 1},
        holds="lora", recipe={"objective": {"kind": EVIL}, "train": EVIL, "learning_rate": EVIL, EVIL: EVIL},
        earlier=[LedgerEntry(digest=EVIL, targets=[EVIL], surrogates=[], prompts=[EVIL])],
    )  # fmt: skip
    wrong = verified(level=EVIL, summary=EVIL, targets={EVIL: EVIL}, report_digest=EVIL, candidate_digest=EVIL)
    rounding = Rounding(dtype=EVIL, still=0.1, cosine=0.9, error=0.1)
    for format in ("diffusers", "lora", "peft"):
        everything = made(
            format, [AppliedPatch(scale=0.5, provenance=odd)], verified=wrong, rounding=rounding, versions={EVIL: EVIL},
            base=EVIL,
        )  # fmt: skip
        text = write(tmp_path / format, everything)
        assert set(metadata(text)) <= {"library_name", "license", "pipeline_tag", "tags"}
        page = Page(text)
        assert set(page.tags) <= set(NAMES)
        assert page.attributes == [("code", "class", "language-python")]
        assert page.tags.count("pre") == 1 and page.tags.count("h1") == 1
        rows = [line for line in text.splitlines() if line.startswith("| 1 |")]
        assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [8]
        assert " ".join(EVIL.split("\u202e")[0].split()) in page.text  # it is all there, as text
        prose = re.sub(r"```python.*?```", "", ModelCard(text).text, flags=re.S)
        assert not re.search(r"https?:|www\.\w|@|[\u202e\x1b]|/home/me", prose)
        compile(re.search(r"```python\n(.*?)\n```", text, re.S)[1], "snippet", "exec")


def test_equal_input_is_equal_bytes(tmp_path, picture):
    for name in "ab":
        write(tmp_path / name, made(verified=verified()), images=[picture])
    first = (tmp_path / "a" / "README.md").read_bytes()
    assert first == (tmp_path / "b" / "README.md").read_bytes()
    shuffled = made(verified=verified(), versions={"diffusers": "0.35.1", "torch": "2.13.0"})
    write(tmp_path / "a", shuffled, images=[picture])
    assert first == (tmp_path / "a" / "README.md").read_bytes()
    assert (tmp_path / "a" / "images" / "01.png").read_bytes() == picture.read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").rglob("*")) == ["01.png", "README.md", "images"]


def test_images_are_only_those_given(tmp_path, picture):
    assert "![" not in write(tmp_path / "out", made())
    given = tmp_path / "given"
    given.mkdir()
    for name in ("private-name.PNG", "second.png", "notes.txt"):
        shutil.copy(picture, given / name)
    page = Page(write(tmp_path / "out", made(), images=card.pictures(given)))
    assert [a for a in page.attributes if a[1] == "src"] == [("img", "src", f"images/0{i}.png") for i in (1, 2)]
    assert "private-name" not in (tmp_path / "out" / "README.md").read_text()
    assert sorted(p.name for p in (tmp_path / "out" / "images").iterdir()) == ["01.png", "02.png"]


@pytest.mark.parametrize("how", ["empty", "text", "cut off", "huge", "endless", "none"])
def test_images_that_are_none_are_refused(tmp_path, picture, how):
    given = tmp_path / "given"
    given.mkdir()
    content = {"empty": b"", "text": b"no picture", "cut off": picture.read_bytes()[:20]}.get(how, picture.read_bytes())
    if how == "endless":
        (given / "x.png").symlink_to("/dev/zero")
    elif how != "none":
        (given / "x.png").write_bytes(content)
    if how == "huge":
        os.truncate(given / "x.png", 2**40)
    with pytest.raises(UsageError, match="given"):
        card.pictures(given)


def test_what_was_not_verified_says_so(tmp_path):
    assert "Not verified." in Page(write(tmp_path, made())).text


def test_a_failed_verdict_is_not_hidden(tmp_path):
    page = Page(write(tmp_path, made(verified=verified(verdict="failed", targets={"f00d1": "failed"}))))
    assert "strong" in page.tags and "forgotten" not in page.text.partition("Results")[2].partition("Where")[0].replace(
        "1 of 1 forgotten", ""
    )


def test_it_says_of_which_weights_the_verdict_is(tmp_path):
    rounding = Rounding(dtype="bfloat16", still=0.25, cosine=0.987, error=0.123)
    page = Page(write(tmp_path, made(verified=verified(), rounding=rounding, dtype="bfloat16"))).text
    assert "Verified before the weights were rounded to bfloat16." in page
    assert all(figure in page for figure in ("0.25", "0.987", "0.123"))
    assert (
        "before the weights"
        not in Page(write(tmp_path, made(verified=verified(candidate_digest=WRITTEN), rounding=rounding))).text
    )
    assert "none of the digests below" in Page(write(tmp_path, made(verified=verified(candidate_digest=FILE)))).text


def test_the_ledger_and_the_scales_are_in_it(tmp_path):
    earlier = LedgerEntry(digest="9" * 64, targets=["aaaa"], surrogates=["5a5a5"], prompts=["a flag"])
    parts = [
        AppliedPatch(scale=0.5, provenance=provenance(earlier=[earlier])),
        AppliedPatch(scale=1.0, provenance=provenance(targets=["bbbb"])),
    ]
    text = write(tmp_path, made(parts=parts))
    page = Page(text).text
    assert "made to forget 3 pictures" in page and "“a flag”" in page and "forget in part" in page
    assert text.index("<code>aaaa</code>") < text.index("<code>f00d1</code>") < text.index("<code>bbbb</code>")
    assert "9" * 64 in page and "5a5a5" not in page


README = "---\nlicense: other\nlicense_name: stabilityai-ai-community\nlicense_link: LICENSE.md\nextra: x\n---\n# Old\n"
KEPT = {"license": "other", "license_name": "stabilityai-ai-community", "license_link": "LICENSE.md"}


@pytest.mark.parametrize(
    ("readme", "wanted"),
    [
        (README, KEPT), ("\ufeff" + README.replace("\n", "\r\n"), KEPT),
        ("---\nlicense: [mit, apache-2.0]\n---\n", {"license": ["mit", "apache-2.0"]}),
        ("---\nlicense_name: mine\n---\n", {"license": "other", "license_name": "mine"}),
        (None, {"license": "other"}), ("# no metadata\n", {"license": "other"}),
        ("---\nlicense: {a: 1}\nlicense_link: 3\n---\n", {"license": "other"}),
        ("---\n- a list\n---\n", {"license": "other"}), ("---\n{: [\n---\n", {"license": "other"}),
        ("---\n1: 2\n---\n", {"license": "other"}), ("---\nlicense: mit\nmodel-index: 3\n---\n", {"license": "mit"}),
        (b"\xff\xfe---", {"license": "other"}), ("---\n" + "[" * 5000 + "\n---\n", {"license": "other"}),
        ("---\nlicense: mit\n---\n" + "x" * 2**20, {"license": "other"}),
        ('---\nlicense: "mit\\n---\\nevil: 1"\n---\n', {"license": "mit --- evil: 1"}),
    ],
)  # fmt: skip
def test_the_licence_of_the_base_is_kept(tmp_path, readme, wanted):
    if readme is not None:
        (tmp_path / "base.md").write_bytes(readme if isinstance(readme, bytes) else readme.encode())
    text = write(tmp_path / "out", made(), base_card=tmp_path / "base.md")
    found = metadata(text)
    assert {k: v for k, v in found.items() if k.startswith("license")} == wanted
    assert "Old" not in text and "extra" not in found and "\r" not in text


BOMB = ["a0: &a0 xxxxxxxxxx", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))]
MANY = ["model-index:", "- &m {name: x, results: &r [" + "*x, " * 5000 + "]}"]


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([*BOMB, "license: *a8"], {"license": "other"}), ([*BOMB, "license: mit"], {"license": "mit"}),
        (["license: [&a mit, *a, [*a, *a]]"], {"license": ["mit", "mit"]}),
        ([*MANY, "license: mit"], {"license": "mit"}), (["license_name:", *["- [[]]"] * 9000], {"license": "other"}),
        (["\n" * 900_000, "license: mit"], {"license": "mit"}),
    ],
    ids=["bomb", "bomb beside", "aliases", "index", "long", "empty lines"],
)  # fmt: skip
def test_a_card_takes_no_longer_to_read_than_it_is_long(tmp_path, rows, wanted):
    (tmp_path / "base.md").write_text("\n".join(["---", *rows, "---", ""]))
    began = time.process_time()
    found = metadata(write(tmp_path / "out", made(), base_card=tmp_path / "base.md"))
    assert {k: v for k, v in found.items() if k.startswith("license")} == wanted
    assert time.process_time() - began < 5


def test_a_pipe_is_no_card(tmp_path):
    os.mkfifo(tmp_path / "base.md")
    assert metadata(write(tmp_path / "out", made(), base_card=tmp_path / "base.md"))["license"] == "other"


def without_t5(folder: Path) -> str:
    """A base that stock loaders refuse unless told."""
    return f"{str(folder)!r}, text_encoder_3=None, tokenizer_3=None"


@pytest.mark.parametrize("format", ["diffusers", "lora", "peft"])
def test_the_lines_are_of_the_family(tmp_path, format):
    row = dataclasses.replace(SD3, pipeline_class="NewPipeline", network="unet")
    text = write(tmp_path, made(format), row)
    assert "from diffusers import NewPipeline\n" in text and "pipe = NewPipeline.from_pretrained(" in text
    assert ("pipe.unet = PeftModel.from_pretrained(pipe.unet, here)" in text) == (format == "peft")
    assert "transformer" not in text and "DiffusionPipeline" not in text


def test_the_lines_for_a_whole_model_open_it(tmp_path):
    pipe = tiny_pipeline().to(torch.bfloat16)
    pipe.save_pretrained(tmp_path / "out")
    write(tmp_path / "out", made(dtype="bfloat16"))
    again = by_its_card(tmp_path / "out")
    assert digest(again.unet.state_dict()) == digest(pipe.unet.state_dict())


def test_the_lines_for_a_whole_model_without_t5_open_it(tmp_path, sd3_folder):
    shutil.copytree(sd3_folder, tmp_path / "out")
    write(tmp_path / "out", made(), SD3)
    again = by_its_card(tmp_path / "out")
    assert digest(again.transformer.state_dict()) == digest(tiny_sd3().transformer.state_dict())


FACTORS = {
    "transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 16),
    "transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(16, 2),
}


def test_the_lines_for_a_lora_open_it(tmp_path, sd3_folder):
    StableDiffusion3Pipeline.save_lora_weights(tmp_path / "out", FACTORS)
    write(tmp_path / "out", made("lora"), SD3)
    again = by_its_card(tmp_path / "out", without_t5(sd3_folder))
    assert any("lora_A" in key for key in again.transformer.state_dict())


def test_the_lines_for_an_adapter_open_it(tmp_path, sd3_folder):
    get_peft_model(tiny_sd3().transformer, LoraConfig(target_modules=["to_q"], r=2)).save_pretrained(tmp_path / "out")
    write(tmp_path / "out", made("peft"), SD3)
    again = by_its_card(tmp_path / "out", without_t5(sd3_folder))
    assert any("lora_A" in key for key in again.transformer.state_dict())
