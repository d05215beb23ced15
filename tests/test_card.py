"""The card of an export: what it says, what it never says, and that nothing a user wrote can break it."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_pipeline, tiny_sd3
from diffusers import StableDiffusion3Pipeline
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt  # rich brings it
from peft import LoraConfig, get_peft_model

from unforget import families
from unforget.errors import UsageError
from unforget.exports import card
from unforget.exports.manifest import Made, Part, Rounding, Verified
from unforget.files.patch import LedgerEntry, Patch, Provenance, bits
from unforget.files.storage import digest, write_tensors

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


def made(format="diffusers", parts=None, **changes) -> Made:
    first = Made(
        format=format, dtype="float32", base="faces", base_digest=BASE, patched_digest=PATCHED, digest=WRITTEN,
        patches=parts or [Part(scale=1.0, provenance=provenance())],
        versions={"torch": "2.13.0", "diffusers": "0.35.1"},
    )  # fmt: skip
    return first.model_copy(update=changes)


def write(folder: Path, made: Made, **more) -> str:
    folder.mkdir(exist_ok=True)
    path = card.write(folder, made, **{"base": "faces", "license": None, **more})
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
                 "objective posterior-swap, weighting clean-space, surgery project, trained bottleneck, learning rate",
                 "1 of 1 forgotten; the rest is kept.", "evidence, never a certificate"):  # fmt: skip
        assert said in page, said
    for never in ("/home/someone", "5a5a5", str(tmp_path), "Not verified", "rounding"):
        assert never not in text, never


def test_the_metadata_is_the_hubs(tmp_path):
    found = metadata(write(tmp_path, made("lora"), base="sd3.5-medium", license="openrail++"))
    assert found == {
        "base_model": "stabilityai/stable-diffusion-3.5-medium", "base_model_relation": "adapter",
        "library_name": "diffusers", "license": "openrail++", "pipeline_tag": "text-to-image",
        "tags": ["unforget", "machine-unlearning", "lora"],
    }  # fmt: skip
    assert ModelCard.load(tmp_path / "README.md").data.base_model == found["base_model"]


@pytest.mark.parametrize(
    ("base", "repo"),
    [
        ("google/ddpm-celebahq-256", "google/ddpm-celebahq-256"), ("o/n@refs/pr/1", "o/n"), ("faces", None),
        ("./o/n", None), ("/abs/o/n", None), ("~/models", None), ("o/n/m", None), ("o/n.safetensors", None),
        ("o--p/n", None), ("o/n'\"", None), ("o/n@a\"b", None), (EVIL, None), ("", None), ("..", None),
    ],
)  # fmt: skip
def test_only_a_hub_id_is_a_base_model(tmp_path, base, repo):
    text = write(tmp_path / "out", made(), base=base)
    found = metadata(text)
    assert found.get("base_model") == repo
    assert ("base_model_relation" in found) == (repo is not None)
    assert "/abs" not in text and "~" not in text and "/n.safetensors" not in text


def test_a_folder_here_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    text = write(tmp_path / "out", made(), base="models/tiny")
    assert "base_model" not in text and "models/" not in text
    assert "# tiny, made to forget" in text


def test_nothing_a_user_wrote_breaks_it(tmp_path):
    odd = provenance(
        prompts=[EVIL], targets=[EVIL], digest=EVIL, versions={EVIL: EVIL}, adapter={"rank": 1, "alpha": 1},
        holds="lora", recipe={"objective": {"kind": EVIL}, "train": EVIL, "learning_rate": EVIL, EVIL: EVIL},
        earlier=[LedgerEntry(digest=EVIL, targets=[EVIL], surrogates=[], prompts=[EVIL])],
    )  # fmt: skip
    wrong = verified(level=EVIL, summary=EVIL, targets={EVIL: EVIL}, report_digest=EVIL, candidate_digest=EVIL)
    rounding = Rounding(dtype=EVIL, still=0.1, cosine=0.9, error=0.1)
    for format in ("lora", "peft", "single-file", "delta"):
        everything = made(
            format, [Part(scale=0.5, provenance=odd)], verified=wrong, rounding=rounding, versions={EVIL: EVIL}
        )
        text = write(tmp_path / format, everything, base=EVIL, license=EVIL, lora_file=f"/home/me/{EVIL}")
        found = metadata(text)
        assert set(found) <= {"library_name", "license", "license_name", "pipeline_tag", "tags"}
        assert (found["license"], found["license_name"][:12]) == ("other", "x-y-script-a")
        page = Page(text)
        assert set(page.tags) <= set(NAMES)
        assert page.attributes == [("code", "class", "language-python")]
        assert page.tags.count("pre") == 1 and page.tags.count("h1") == 1
        assert [len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("| 1 |")] == [8, 4]
        assert " ".join(EVIL.split("\u202e")[0].split()) in page.text  # it is all there, as text
        prose = re.sub(r"```python.*?```", "", ModelCard(text).text, flags=re.S)
        assert not re.search(r"https?:|www\.\w|@|[\u202e\x1b]|/home/me", prose)
        compile(re.search(r"```python\n(.*?)\n```", text, re.S)[1], "snippet", "exec")


def test_equal_input_is_equal_bytes(tmp_path, picture):
    for name in "ab":
        write(tmp_path / name, made(verified=verified()), pictures=[picture])
    first = (tmp_path / "a" / "README.md").read_bytes()
    assert first == (tmp_path / "b" / "README.md").read_bytes()
    shuffled = made(verified=verified(), versions={"diffusers": "0.35.1", "torch": "2.13.0"})
    write(tmp_path / "a", shuffled, pictures=[tmp_path / "a" / "images" / "01.png"])  # over its own, from its own
    assert first == (tmp_path / "a" / "README.md").read_bytes()
    assert (tmp_path / "a" / "images" / "01.png").read_bytes() == picture.read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").rglob("*")) == ["01.png", "README.md", "images"]


def test_pictures_are_only_those_given(tmp_path, picture):
    assert "![" not in write(tmp_path / "out", made())
    page = Page(write(tmp_path / "out", made(), pictures=[picture, picture]))
    assert [a for a in page.attributes if a[1] == "src"] == [("img", "src", f"images/0{i}.png") for i in (1, 2)]
    assert picture.name not in (tmp_path / "out" / "README.md").read_text()
    (tmp_path / "notes.txt").write_text("x")
    for wrong in ("notes.txt", "none.png"):
        with pytest.raises(UsageError, match="no picture for a card"):
            write(tmp_path / "new", made(), pictures=[picture, tmp_path / wrong])
        assert not list((tmp_path / "new").iterdir())


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
        Part(scale=0.5, provenance=provenance(earlier=[earlier])),
        Part(scale=1.0, provenance=provenance(targets=["bbbb"])),
    ]
    text = write(tmp_path, made(parts=parts))
    page = Page(text).text
    assert "made to forget 3 pictures" in page and "“a flag”" in page and "forget in part" in page
    assert text.index("<code>aaaa</code>") < text.index("<code>f00d1</code>") < text.index("<code>bbbb</code>")
    assert "9" * 64 in page and "5a5a5" not in page


README = "---\nlicense: other\nlicense_name: stabilityai-ai-community\nlicense_link: LICENSE.md\nextra: x\n---\n# Old\n"
KEPT = {"license": "other", "license_name": "stabilityai-ai-community", "license_link": "LICENSE.md"}


@pytest.mark.parametrize(
    ("readme", "license", "wanted"),
    [
        (README, None, KEPT), ("\ufeff" + README.replace("\n", "\r\n"), None, KEPT),
        (README, "StabilityAI-AI-Community", KEPT), (README, "MIT", {"license": "mit"}),
        ("---\nlicense: [mit, apache-2.0]\n---\n", None, {"license": ["mit", "apache-2.0"]}),
        ("---\nlicense_name: mine\n---\n", None, {"license": "other", "license_name": "mine"}),
        (None, "Mine, All Mine 1.0", {"license": "other", "license_name": "mine-all-mine-1.0"}),
        (None, None, {"license": "other"}), ("# no metadata\n", None, {"license": "other"}),
        ("---\nlicense: {a: 1}\nlicense_link: 3\n---\n", None, {"license": "other"}),
        ("---\n- a list\n---\n", None, {"license": "other"}), ("---\n{: [\n---\n", None, {"license": "other"}),
        ("---\n1: 2\n---\n", None, {"license": "other"}),
        ("---\nlicense: mit\nmodel-index: 3\n---\n", "", {"license": "mit"}),
        (b"\xff\xfe---", None, {"license": "other"}), ("---\n" + "[" * 5000 + "\n---\n", None, {"license": "other"}),
        ("---\nlicense: mit\n---\n" + "x" * 2**20, None, {"license": "other"}),
        ('---\nlicense: "mit\\n---\\nevil: 1"\n---\n', None, {"license": "mit --- evil: 1"}),
    ],
)  # fmt: skip
def test_the_licence_of_the_base_is_kept(tmp_path, readme, license, wanted, caplog):
    if readme is not None:
        (tmp_path / "README.md").write_bytes(readme if isinstance(readme, bytes) else readme.encode())
    text = write(tmp_path, made(), license=license)
    found = metadata(text)
    assert {k: v for k, v in found.items() if k.startswith("license")} == wanted
    assert "Old" not in text and "extra" not in found and "\r" not in text
    assert metadata(write(tmp_path, made(), license=license)) == found  # and again, over its own


def test_a_named_licence_links_to_its_text(tmp_path):
    (tmp_path / "LICENSE").write_text("Do.")
    assert metadata(write(tmp_path, made(), license="Mine"))["license_link"] == "LICENSE"


def test_the_folder_says_what_the_model_does(tmp_path, tiny_folder, sd3_folder):
    for folder, task in ((tiny_folder, "unconditional-image-generation"), (sd3_folder, "text-to-image")):
        (tmp_path / task).mkdir()
        (tmp_path / task / "model_index.json").write_bytes((folder / "model_index.json").read_bytes())
        assert metadata(write(tmp_path / task, made()))["pipeline_tag"] == task
    for content in ('["_class_name"', '["_class_name"]', '{"_class_name": ["DDPMPipeline"]}', '{"_class_name": "X"}'):
        (tmp_path / "model_index.json").write_text(content)
        assert "pipeline_tag" not in metadata(write(tmp_path, made()))
    (tmp_path / "broken.safetensors").write_bytes(b"x" * 16)
    assert "pipeline_tag" not in metadata(write(tmp_path, made("transformer")))


def test_a_model_that_a_delta_was_taken_off_claims_nothing(tmp_path):
    nothing = made().model_copy(update={"patches": []})
    page = Page(write(tmp_path, nothing)).text
    assert "not made to forget anything" in page and BASE in page
    assert "patch" not in page.replace("the base with the patches on", "") and "Limits" not in page


def test_it_wants_a_folder(tmp_path):
    with pytest.raises(UsageError, match="no folder"):
        card.write(tmp_path / "none", made(), base="faces", license=None)


def run(folder: Path, base: object, monkeypatch) -> object:
    """The pipeline that the card's own lines open."""
    code = re.search(r"```python\n(.*?)\n```", (folder / "README.md").read_text(), re.S)[1]
    monkeypatch.chdir(folder)
    names = {}
    exec(code.replace('"path/to/the/base"', str(base)), names)
    return names["pipe"]


def without_t5(folder: Path) -> str:
    """A base that stock loaders refuse unless told."""
    return f"{str(folder)!r}, text_encoder_3=None, tokenizer_3=None"


def test_the_lines_for_a_whole_model_open_it(tmp_path, monkeypatch):
    pipe = tiny_pipeline().to(torch.bfloat16)
    pipe.save_pretrained(tmp_path / "out")
    write(tmp_path / "out", made(dtype="bfloat16"))
    again = run(tmp_path / "out", None, monkeypatch)
    assert digest(again.unet.state_dict()) == digest(pipe.unet.state_dict())


def test_the_lines_for_a_whole_model_without_t5_open_it(tmp_path, sd3_folder, monkeypatch):
    shutil.copytree(sd3_folder, tmp_path / "out")
    write(tmp_path / "out", made())
    again = run(tmp_path / "out", None, monkeypatch)
    assert digest(again.transformer.state_dict()) == digest(tiny_sd3().transformer.state_dict())


@pytest.mark.parametrize("kind", ["sd3", "ddpm"])
def test_the_lines_for_a_network_open_it(kind, tmp_path, sd3_folder, tiny_folder, monkeypatch):
    network = (tiny_sd3(seed=1).transformer if kind == "sd3" else tiny_pipeline(seed=1).unet).to(torch.float16)
    (tmp_path / "out").mkdir()
    write_tensors(network.state_dict(), {"format": "pt"}, tmp_path / "out" / "network.safetensors")
    found = metadata(write(tmp_path / "out", made("transformer", dtype="float16")))
    assert found["pipeline_tag"] == ("text-to-image" if kind == "sd3" else "unconditional-image-generation")
    again = run(tmp_path / "out", without_t5(sd3_folder) if kind == "sd3" else repr(str(tiny_folder)), monkeypatch)
    assert digest((again.transformer if kind == "sd3" else again.unet).state_dict()) == digest(network.state_dict())


FACTORS = {
    "transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 16),
    "transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(16, 2),
}


def test_the_lines_for_a_lora_open_it(tmp_path, sd3_folder, monkeypatch):
    StableDiffusion3Pipeline.save_lora_weights(tmp_path / "out", FACTORS, weight_name="mine.safetensors")
    write(tmp_path / "out", made("lora"), lora_file="mine.safetensors")
    again = run(tmp_path / "out", without_t5(sd3_folder), monkeypatch)
    assert any("lora_A" in key for key in again.transformer.state_dict())


def test_the_lines_for_an_adapter_open_it(tmp_path, sd3_folder, monkeypatch):
    get_peft_model(tiny_sd3().transformer, LoraConfig(target_modules=["to_q"], r=2)).save_pretrained(tmp_path / "out")
    write(tmp_path / "out", made("peft"))
    again = run(tmp_path / "out", without_t5(sd3_folder), monkeypatch)
    assert any("lora_A" in key for key in again.transformer.state_dict())


def test_the_lines_for_a_delta_put_it_on(tmp_path, monkeypatch):
    faces, name = families.load("faces").network.state_dict(), "mid_block.resnets.0.conv1.weight"
    (tmp_path / "out").mkdir()
    made_of = provenance(holds="bits", base_digest=digest(faces))
    Patch({name: bits(faces[name], faces[name] + 1)}, made_of).save(tmp_path / "out" / "delta.safetensors")
    found = metadata(write(tmp_path / "out", made("delta", [Part(scale=1.0, provenance=made_of)])))
    assert found["pipeline_tag"] == "unconditional-image-generation"
    again = run(tmp_path / "out", None, monkeypatch).unet.state_dict()
    assert torch.equal(again[name], faces[name] + 1)
