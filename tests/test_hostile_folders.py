"""Model folders and checkpoints that are not what they say: promises 2 to 5 of docs/security.md, by kinds of attack."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import rewrite, tiny_pipeline
from pipelines import tiny_dit, tiny_flux, tiny_pixart, tiny_sana, tiny_sd, tiny_sd3, tiny_z_image
from safetensors.torch import load_file, save_file

from unforget import families
from unforget.errors import CannotRun, UnforgetError, UsageError
from unforget.exports.formats.diffusers_folder import copies
from unforget.families import safety
from unforget.families.memory import blueprint
from unforget.families.parts import classes, listed, stored
from unforget.files.patch import Patch, Provenance
from unforget.files.storage import digest

HERE = Path(__file__).parent
MADE = {
    "ddpm": tiny_pipeline, "sd": tiny_sd, "sd3": tiny_sd3, "flux": tiny_flux, "z-image": tiny_z_image,
    "sana": tiny_sana, "pixart": tiny_pixart, "dit": tiny_dit,
}  # fmt: skip
SOME = ("sd", "sd3", "z-image")
MARK = "'''Leaves a trace where it is imported.'''\nfrom pathlib import Path\nPath('pwned').mkdir()\nclass Evil: pass\n"


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
    """A sound folder of each family."""
    home = tmp_path_factory.mktemp("sound")
    for name, make in MADE.items():
        make().save_pretrained(home / name)
    return home


@pytest.fixture
def folder(request, sound, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(sound / request.param, tmp_path / "model"))


def families_of(*names):
    return pytest.mark.parametrize("folder", names, indirect=True)


def refused(folder, sentence):
    """Loading ends with a sentence, and nothing of the folder ran."""
    with pytest.raises((UsageError, CannotRun), match=sentence) as caught:
        families.load(str(folder))
    assert caught.value.hint
    assert not Path("pwned").exists()


def parts(folder):
    return listed(folder, classes(families.spec_of(str(folder))))


@families_of(*MADE)
def test_a_sound_folder_opens(folder):
    families.load(str(folder))


# 2. No code comes with a model.


@families_of(*SOME)
@pytest.mark.parametrize("made_by", [
    ["transformers", "CLIPProcessor"], ["transformers", "AutoTokenizer"], ["transformers", "AutoModel"],
    ["diffusers", "DiffusionPipeline"], ["diffusers", "OnnxRuntimeModel"], ["transformers", "RagTokenizer"],
    ["diffusers", "AutoModel"], ["pipelines", "Evil"], ["evil", "Evil"],
])  # fmt: skip
def test_every_part_is_of_a_class_that_its_family_has(folder, made_by):
    index = json.loads((folder / "model_index.json").read_text())
    for name in [*(n for n, v in index.items() if isinstance(v, list)), "feature_extractor", "one_more"]:
        (folder / "model_index.json").write_text(json.dumps({**index, name: made_by}))
        refused(folder, "is code of its own|is no part of")


KEYS = [
    ("auto_map", {"AutoTokenizer": ["evil.Evil", None], "AutoModel": "evil.Evil"}), ("custom_pipeline", "evil"),
    ("custom_generate", "evil"), ("base_model_name_or_path", "someone/else"), ("transformers_weights", "x.safetensors"),
    ("fast_tokenizer_files", ["../../tokenizer.json"]), ("init_inputs", ["/etc/passwd"]), ("gguf_file", "/x.gguf"),
    ("attn_implementation", "someone/kernels"), ("_attn_implementation", "someone/kernels@main:x"),
    ("attn_implementation", {"": "someone/kernels"}), ("trust_remote_code", True),
]  # fmt: skip


@families_of("sd", "sd3")
@pytest.mark.parametrize(("key", "value"), KEYS, ids=lambda v: v if isinstance(v, str) else "")
def test_no_configuration_asks_for_code_or_another_place(folder, key, value):
    for part in parts(folder):
        (part.home / "evil.py").write_text(MARK)
        for file in part.files():
            if file.name.endswith("config.json"):
                kept = file.read_text()
                for change in ({key: value}, {"more": {"inside": [{key: value}]}}):
                    rewrite(file, **change)
                    refused(folder, f"code|names another place.*{key}")
                file.write_text(kept)


@families_of("sd3")
def test_what_libraries_see_is_what_was_looked_at(folder):
    """Traps beside the files that are read: a shard that makes transformers read another way, code, a checkpoint."""
    before = families.load(str(folder)).network.state_dict()
    for part in parts(folder):
        for name in ("shard-00000-model-00001-of-00001.safetensors", "tekken.json", "evil.py", "x.fp16.safetensors",
                     "generation_config.json", "custom_generate/generate.py", "flashpack.bin"):  # fmt: skip
            (part.home / name).parent.mkdir(exist_ok=True)
            (part.home / name).write_text(MARK)
    (folder / "pipeline.py").write_text(MARK)
    after = families.load(str(folder)).network.state_dict()
    assert not Path("pwned").exists()
    assert all(torch.equal(before[n], after[n]) for n in before)


def run(*args, answer="", env=None, python=()):
    """The real command: its exit code, and all that it said."""
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    asked = [sys.executable, *python, "-m", "unforget", *map(str, args)]
    online = {n: v for n, v in os.environ.items() if not n.startswith("HF_HUB")}
    done = subprocess.run(
        asked, input=answer, capture_output=True, text=True, env={**online, "PYTHONPATH": path, **(env or {})}
    )
    return done.returncode, done.stdout + done.stderr


def patch_of(folder):
    """A patch that changes one tensor of a model."""
    state = families.load(str(folder)).network.state_dict()
    name = next(n for n in state if n.endswith(".bias"))
    made = Provenance(
        base="x", base_digest=digest(state), targets=[], surrogates=[], recipe={}, seed=0, steps=0, versions={}
    )
    Patch({name: state[name] + 1}, made).save(Path("a.patch"))
    return "a.patch"


@pytest.mark.slow
@families_of("sd3")
def test_nobody_answers_what_a_library_asks(folder):
    """`echo y | unforget export`: transformers would import a module of the folder after a yes."""
    patch = patch_of(folder)
    tokens = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
    shutil.copytree(folder / "tokenizer", folder / "feature_extractor")
    (folder / "feature_extractor" / "evil.py").write_text(MARK)
    evil = {**tokens, "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    for made_by in ("CLIPProcessor", "CLIPImageProcessor"):
        rewrite(folder / "model_index.json", feature_extractor=["transformers", made_by])
        for name in ("tokenizer_config.json", "preprocessor_config.json", "config.json"):
            (folder / "feature_extractor" / name).write_text(json.dumps(evil))
        code, said = run("export", "--model", folder, "--patch", patch, "-o", "out", answer="y\n" * 9)
        assert code == 2, said
        assert "Traceback" not in said
        assert not list(Path().rglob("pwned"))


def on_the_hub(folder, monkeypatch, *, weights):
    """The same as the hub's cache has it, where nothing is downloaded: links to files named by their digests."""
    import huggingface_hub.constants

    commit, repo = "a" * 40, Path("hub/models--someone--tiny").absolute()
    shutil.rmtree("hub", ignore_errors=True)
    for file in (f for f in folder.rglob("*") if f.is_file() and (weights or f.suffix != ".safetensors")):
        blob, link = repo / "blobs" / file.relative_to(folder), repo / "snapshots" / commit / file.relative_to(folder)
        for place in (blob, link):
            place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(blob)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for module in [huggingface_hub.constants, *list(sys.modules.values())]:
        if getattr(module, "__name__", "").startswith(("diffusers", "huggingface_hub")) and hasattr(
            module, "HF_HUB_CACHE"
        ):
            monkeypatch.setattr(module, "HF_HUB_CACHE", str(Path("hub").absolute()))
    return "someone/tiny"


@families_of(*MADE)
def test_a_plan_of_a_model_on_the_hub_needs_no_weights(folder, monkeypatch):
    local = blueprint(str(folder), families.Options())
    plan = blueprint(on_the_hub(folder, monkeypatch, weights=False), families.Options())
    for say in (lambda p: p.latent_shape, lambda p: p.beside, lambda p: p.encoders, lambda p: p.sampling_timesteps(3)):
        assert say(plan) == say(local)


def hostile(folder):
    """Changes of any configuration that no plan is made of, one at a time."""
    for part in (p for p in parts(folder) if p.loaded):
        for file in (f for f in part.files() if f.name.endswith("config.json")):
            kept = file.read_text()
            for key, value in [("auto_map", {"AutoModel": "evil.Evil"}), ("base_model_name_or_path", "someone/else")]:
                rewrite(file, **{key: value})
                yield file
            for content in (b"[" * 200_000, b"\xff\xfe", b"[]", b" " * 2**21):
                file.write_bytes(content)
                yield file
            file.write_text(kept)
            if part.kind == "model":
                for key in [k for k, v in json.loads(kept).items() if isinstance(v, list) and v]:
                    rewrite(file, **{**json.loads(kept), key: [0] * 5000})
                    yield file
                rewrite(file, **{**json.loads(kept), "num_layers": 20_000})
                yield file
            file.write_text(kept)
    index = folder / "model_index.json"
    kept = index.read_text()
    for content in (b"[" * 200_000, b" " * 2**21, b"[]", b"{}"):
        index.write_bytes(content)
        yield index
    index.write_text(kept)
    for change in (
        {"vae": ["evil", "Evil"]},
        {"more": ["transformers", "CLIPProcessor"]},
        {"../x": ["diffusers", "UNet2DModel"]},
    ):
        rewrite(index, **change)
        yield index
        index.write_text(kept)


@families_of("sd", "sd3", "z-image")
def test_a_plan_of_a_model_on_the_hub_looks_at_it_first(folder, monkeypatch):
    """`--dry-run` builds from configurations alone, before any weights are here."""
    for file in hostile(folder):
        begun = time.process_time()
        with pytest.raises(UnforgetError) as caught:
            blueprint(on_the_hub(folder, monkeypatch, weights=False), families.Options())
        assert caught.value.hint and len(caught.value.message) < 600, file
        assert time.process_time() - begun < 5, file


@families_of("sd3")
def test_a_plan_of_a_single_file_looks_at_the_hubs_configuration_first(folder, monkeypatch):
    first = folder / "text_encoder" / "model.safetensors"
    save_file({**load_file(first), "text_projection.weight": torch.eye(8)}, first, {"format": "pt"})
    family = families.load(str(folder))
    origin = families.weights.source(str(folder), family, None)
    tensors = families.weights.checkpoint(origin, origin.tensors, family.network.config)
    save_file({k: v.make().clone() for k, v in tensors.items()}, "one.safetensors")
    options = families.Options(pipeline_config=Path(on_the_hub(folder, monkeypatch, weights=False)))
    assert blueprint("one.safetensors", options).latent_shape == family.latent_shape
    for part in ("transformer", "tokenizer"):
        file = folder / part / ("config.json" if part == "transformer" else "tokenizer_config.json")
        kept = file.read_text()
        rewrite(file, auto_map={"AutoModel": "evil.Evil"})
        on_the_hub(folder, monkeypatch, weights=False)
        with pytest.raises(UsageError, match="auto_map"):
            blueprint("one.safetensors", options)
        file.write_text(kept)


@pytest.mark.slow
@families_of("sd3")
def test_the_command_plans_nothing_of_a_hostile_model_on_the_hub(folder, monkeypatch):
    shutil.copy(HERE / "data" / "surrogate.png", "t.png")
    model = on_the_hub(folder, monkeypatch, weights=False)
    asked = "unlearn", "--model", model, "-t", "t.png", "--resize", "-o", "x", "--dry-run", "--json"
    env = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(Path("hub").absolute())}
    code, said = run(*asked, env=env)
    assert code == 0 and "memory_gib" in said, said
    rewrite(folder / "transformer" / "config.json", auto_map={"AutoModel": "evil.Evil"})
    on_the_hub(folder, monkeypatch, weights=False)
    code, said = run(*asked, env=env)
    assert code == 2 and "asks for code of its own" in said, said


def test_a_question_of_a_library_is_not_answered(monkeypatch):
    from unforget.families.loading import opening

    with pytest.raises(CannotRun, match="EOF"), opening("x", "x"):
        input("Do you trust it? [y/N]")


def test_an_editor_is_looked_at_as_well(editor_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert families.editor(str(editor_folder))[0].unet is not None
    index = json.loads((editor_folder / "model_index.json").read_text())
    for name in ("unet", "text_encoder", "tokenizer", "feature_extractor"):
        for made_by in (["transformers", "CLIPProcessor"], ["evil", "Evil"], ["transformers", "AutoModel"]):
            (editor_folder / "model_index.json").write_text(json.dumps({**index, name: made_by}))
            with pytest.raises(UsageError, match="code of its own"):
                families.editor(str(editor_folder))
    for kind in ("StableDiffusionPipeline", "AutoModel", "os", "KandinskyCombinedPipeline"):
        (editor_folder / "model_index.json").write_text(json.dumps({**index, "_class_name": kind}))
        with pytest.raises((UsageError, CannotRun)):
            families.editor(str(editor_folder))
    (editor_folder / "model_index.json").write_text(json.dumps(index))
    rewrite(editor_folder / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": "evil.Evil"})
    with pytest.raises(UsageError, match="auto_map"):
        families.editor(str(editor_folder))


# 3. No network and no other place.


@families_of("sd", "sd3", "flux")
@pytest.mark.parametrize("beside", [True, False], ids=["beside", "instead"])
@pytest.mark.parametrize("base", ["someone/else", "/etc", "../elsewhere"])
def test_an_adapter_is_no_part(folder, beside, base):
    for part in (p for p in parts(folder) if p.kind == "model"):
        kept = (part.home / "config.json").read_text()
        if not beside:
            (part.home / "config.json").unlink()
        (part.home / "adapter_config.json").write_text(
            json.dumps({"base_model_name_or_path": base, "peft_type": "LORA"})
        )
        refused(folder, f"'{part.name}' is an adapter")
        (part.home / "adapter_config.json").unlink()
        (part.home / "config.json").write_text(kept)


def test_the_kernel_kills_whoever_asks_the_network():
    """The means of the next test: a socket of Python and a look-up by the C library in another thread."""
    ask = "import threading, socket; t = threading.Thread(target=socket.getaddrinfo, args=('a.invalid', 9)); t.start()"
    for code in ("import socket; socket.socket()", "import socket; socket.socket(10, 2)", f"{ask}; t.join()"):
        assert subprocess.run([sys.executable, HERE / "without_network.py", "-c", code]).returncode < 0
    subprocess.run(
        [sys.executable, HERE / "without_network.py", "-c", "import socket; socket.socketpair()"], check=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["ddpm", "sd3"], indirect=True)
def test_a_local_model_needs_no_network(folder, picture):
    """The hub's own switch is not thrown here."""
    (folder / "unforget.json").write_text('{"retain_prompts": ["a red square"]}')
    code, said = run(
        "export", "--model", folder, "--patch", patch_of(folder), "-o", "out", python=[HERE / "without_network.py"]
    )
    assert code == 0, said
    assert Path("out/model_index.json").is_file()


@pytest.mark.parametrize("name", [
    "ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK",
    "DIFFUSERS_DISABLE_REMOTE_CODE", "DISABLE_SAFETENSORS_CONVERSION", "USE_HUB_KERNELS",
])  # fmt: skip
def test_telemetry_and_remote_code_are_off_unless_the_user_said_otherwise(name):
    code = f"import os; import unforget, sys; assert 'torch' not in sys.modules; print(os.environ['{name}'])"
    for env, expected in ({}, {"1", "NO"}), ({name: "mine"}, {"mine"}):
        bare = {n: v for n, v in os.environ.items() if n != name}
        path = str(HERE.parent)
        done = subprocess.run(
            [sys.executable, "-c", code], env={**bare, "PYTHONPATH": path, **env}, capture_output=True
        )
        assert done.stdout.decode().strip() in expected, done.stderr


@pytest.mark.slow
def test_a_program_of_the_similarity_backend_reports_nothing():
    """onnxruntime 1.32 asks for names of its maker's 24 seconds after it was imported."""
    code = "import unforget, onnxruntime, time; time.sleep(40)"
    path = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    subprocess.run([sys.executable, HERE / "without_network.py", "-c", code], check=True, env=path)


# 4. File names and links lead nowhere else.


@families_of("sd3", "z-image")
def test_an_export_takes_what_loaders_read_and_nothing_else(folder):
    secret = Path("secret")
    secret.write_text('{"password": "hunter2"}')
    for part in parts(folder):
        for name in ("notes.txt", "credentials.json", "x.model", "x.jinja", "training_args.json"):
            (part.home / name).symlink_to(secret.resolve())
    (folder / "LICENSE.txt").symlink_to(secret.resolve())
    found, missing = copies(folder, families.spec_of(str(folder)))
    assert not missing
    assert not any("hunter2" in file.read_text(errors="ignore") for file in found.values())
    families.load(str(folder))
    for part in parts(folder):
        for file in part.files():
            kept = file.rename(file.with_name("kept"))
            file.symlink_to(secret.resolve())
            refused(folder, "leads out of the folder")
            file.unlink()
            kept.rename(file)


@families_of("sd3")
def test_linked_weights_and_parts_are_followed(folder):
    """People share large files so."""
    shutil.move(folder / "vae", "elsewhere")
    (folder / "vae").symlink_to(Path("elsewhere").resolve())
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    shutil.move(file, "weights.safetensors")
    file.symlink_to(Path("weights.safetensors").resolve())
    families.load(str(folder))


INDEX = {"transformer": "diffusion_pytorch_model", "text_encoder": "model"}


@families_of("sd3")
@pytest.mark.parametrize("part", INDEX)
@pytest.mark.parametrize("bad", ["file", "index"])
def test_the_file_that_is_read_is_the_one_that_is_checked(folder, part, bad):
    """Of a file and an index of shards diffusers reads the index, and transformers the file."""
    home, stem = folder / part, INDEX[part]
    file, index = home / f"{stem}.safetensors", home / f"{stem}.safetensors.index.json"
    tensors, shard = load_file(file), f"{stem}-00001-of-00001.safetensors"
    damaged = {n: t + float("nan") if t.is_floating_point() else t for n, t in tensors.items()}
    save_file(damaged if bad == "index" else tensors, home / shard, {"format": "pt"})
    save_file(damaged if bad == "file" else tensors, file, {"format": "pt"})
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}))
    reads = "index" if part == "transformer" else "file"
    assert stored(home, stem) == {"index": index, "file": file}[reads]
    if bad == reads:
        refused(folder, "NaN")
    else:
        families.load(str(folder))


@families_of("ddpm", "sd3")
@pytest.mark.parametrize("word", ["fp16", "bf16", "non_ema", "mine"])
def test_the_only_variant_is_read_whatever_it_is_called(folder, word):
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.{word}.safetensors"))
    family = families.load(str(folder))
    assert families.weights.source(str(folder), family, None).tensors
    for file in list(folder.rglob("*.safetensors")):
        shutil.copy(file, str(file).replace(f".{word}.", ".other."))
    refused(folder, "variants")


# 5. Sizes are checked before memory is taken.


@families_of("ddpm", "sd3", "sana")
def test_whatever_number_a_configuration_multiplies_it_is_refused_at_once(folder):
    """Every whole number and every list of each part, one at a time, whatever it is called."""
    spec = families.spec_of(str(folder))
    for part in (p for p in parts(folder) if p.kind == "model" and p.loaded):
        file = part.home / "config.json"
        kept = json.loads(file.read_text())
        for key, value in kept.items():
            for changed in larger(value):
                file.write_text(json.dumps({**kept, key: changed}))
                begun = time.process_time()
                try:
                    safety.check(folder, spec, False)
                except UnforgetError as error:
                    assert error.hint
                assert time.process_time() - begun < 2, (part.name, key, changed)
        file.write_text(json.dumps(kept))


def larger(value):
    """A value as a hostile configuration has it; none for what is neither a number nor a list of such."""
    if isinstance(value, int) and not isinstance(value, bool):
        return [20_000, None]
    if isinstance(value, list) and value:
        return [value * (4096 // len(value)), [2000] * len(value)] if isinstance(value[0], (int, str)) else []
    return []


@families_of("sd3")
def test_a_product_of_modest_numbers_is_refused_at_once(folder):
    rewrite(folder / "vae" / "config.json", layers_per_block=64, block_out_channels=[4] * 256,
            down_block_types=["DownEncoderBlock2D"] * 256, up_block_types=["UpDecoderBlock2D"] * 256)  # fmt: skip
    begun = time.process_time()
    refused(folder, "asks for more than its file holds")
    assert time.process_time() - begun < 2


@families_of("dit", "pixart")
def test_tables_that_are_computed_take_no_more_than_the_weights(folder):
    rewrite(folder / "transformer" / "config.json", sample_size=8192)
    refused(folder, "tables of")


TWICE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
DEEP: dict = {"type": "NFC"}
for _ in range(400):
    DEEP = {"type": "Sequence", "normalizers": [DEEP]}
GROWING = [
    DEEP,
    {"type": "Sequence", "normalizers": [TWICE] * 26},
    {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [TWICE] * 5}] * 5},
    {"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 10**6},
    {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "a" * 99}] * 9},
]


@families_of("z-image", "pixart")
def test_a_tokenizer_that_makes_a_prompt_ever_longer(folder):
    file = folder / "tokenizer" / "tokenizer.json"
    sound = json.loads(file.read_text())
    for normalizer in GROWING:
        file.write_text(json.dumps({**sound, "normalizer": normalizer}))
        refused(folder, "makes more than|too many steps|nested too deep")
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "\u2581"}
    marked = [{"type": "Prepend", "prepend": "\u2581"}, {"type": "NFKC"}, spaces]
    file.write_text(json.dumps({**sound, "normalizer": {"type": "Sequence", "normalizers": marked}}))
    families.load(str(folder))


CONTENT = [b"\xff\xfe", b"\x80\x81", b"[" * 200_000, b"[1, 2]", b'"x"', b"", b"{", b"null", b"{}" * 9]


@families_of("sd3")
@pytest.mark.parametrize("content", CONTENT, ids=range(len(CONTENT)))
def test_what_is_no_table_is_one_sentence(folder, content):
    for file in [folder / "model_index.json", *(f for p in parts(folder) for f in p.files() if f.suffix == ".json")]:
        kept = file.read_bytes()
        file.write_bytes(content)
        with pytest.raises(UnforgetError) as caught:
            families.load(str(folder))
        assert caught.value.hint and len(caught.value.message) < 600, file
        file.write_bytes(kept)


# What a family cannot drive, and files that are no model, by their names.


GROWS = {"type": "Replace", "pattern": {"Regex": "."}, "content": "xxxxxxxx"}
FILL = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
SPECIAL = {"SpecialToken": {"id": "x", "type_id": 0}}


@families_of("sd3", "z-image")
@pytest.mark.parametrize(("key", "value", "sentence"), [
    ("normalizer", {"type": "Sequence", "normalizers": [GROWS] * 12}, "characters of one"),
    ("normalizer", {"type": "Prepend", "prepend": "x" * 900}, "characters of one"),
    ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}] * 999}, "too many steps"),
    ("post_processor", {"type": "TemplateProcessing", "single": [SPECIAL] * 999, "pair": [],
                        "special_tokens": {"x": {"id": "x", "ids": [0], "tokens": ["x"]}}}, "too many steps"),
    ("padding", {**FILL, "strategy": {"Fixed": 10**9}}, "tokens .padding"),
    ("padding", {**FILL, "strategy": {"Fixed": 1}, "pad_to_multiple_of": 2**30}, "tokens .padding"),
    ("truncation", {"direction": "Right", "max_length": 2**40, "strategy": "LongestFirst", "stride": 0}, "tokens"),
    ("added_tokens", [{"id": i, "content": f"t{i}"} for i in range(20_000)], "tokens beside its words"),
])  # fmt: skip
def test_what_a_tokenizer_may_make_of_a_prompt_is_bounded(folder, key, value, sentence):
    rewrite(folder / "tokenizer" / "tokenizer.json", **{key: value})
    refused(folder, sentence)


@families_of("sd")
@pytest.mark.parametrize("pattern", ["(x+x+)+y", "(x|xx)+$"])
def test_a_pattern_that_tries_for_ever_is_one_sentence(folder, pattern):
    """The library bounds the tries, and panics; CLIP's tokenizer does not take such a file at its word."""
    rewrite(folder / "model_index.json", tokenizer=["transformers", "PreTrainedTokenizerFast"])
    rewrite(folder / "tokenizer" / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    rewrite(folder / "tokenizer" / "tokenizer.json", pre_tokenizer=split)
    with pytest.raises(CannotRun, match="retry-limit") as caught:
        families.load(str(folder), families.Options(resolution=16)).prompt_ids(["x" * 60 + "z"])
    assert caught.value.hint


@families_of("sd3")
@pytest.mark.parametrize("said", [
    {"retain_prompts": ["x" * 5000]}, {"retain_prompts": ["x"] * 5000}, {"guidance": float("inf")}, {"guidance": 1e308},
], ids=lambda said: next(iter(said)))  # fmt: skip
def test_what_a_model_says_of_itself_is_bounded(folder, said):
    (folder / "unforget.json").write_text(json.dumps(said))
    refused(folder, "not what this tool expects")


@families_of("z-image")
def test_a_model_that_opens_and_cannot_work_is_one_sentence(folder):
    (folder / "tokenizer" / "chat_template.jinja").write_text("")  # no token is left of a prompt
    with pytest.raises(CannotRun) as caught:
        loaded = families.load(str(folder), families.Options(resolution=32))
        loaded.predict(torch.zeros(1, *loaded.latent_shape), torch.tensor([500.0]), torch.tensor([0]))
    assert caught.value.hint


@pytest.mark.parametrize("error", [
    ValueError("odd"), RuntimeError("shape"), AssertionError(), KeyError("k"), ZeroDivisionError(), StopIteration(),
], ids=repr)  # fmt: skip
def test_whatever_a_library_raises_while_a_model_works_is_one_sentence(error):
    with pytest.raises(CannotRun, match=r"the model 'm' cannot work: .+") as caught, families.asking("m"):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [
    UsageError("x"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), KeyboardInterrupt(),
], ids=repr)  # fmt: skip
def test_what_is_no_librarys_stays_as_it_is(error):
    with pytest.raises(type(error)) as caught, families.asking("m"):
        raise error
    assert caught.value is error


@families_of("sd3")
def test_a_shifted_schedule_of_sd3_works(folder):
    rewrite(folder / "scheduler" / "scheduler_config.json", use_dynamic_shifting=True)
    from diffusers import StableDiffusion3Pipeline

    model = families.load(str(folder))
    stock = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    stock("a red square", num_inference_steps=3, height=16, width=16, output_type="latent")
    assert model.sampling_timesteps(3) == pytest.approx(stock.scheduler.timesteps.tolist())


@families_of("sd", "sana", "pixart", "dit")
def test_a_schedule_that_asks_for_what_the_family_does_not_give(folder):
    file = folder / "scheduler" / "scheduler_config.json"
    kept = json.loads(file.read_text())
    for change in (
        {"use_dynamic_shifting": True, "use_flow_sigmas": True}, {"prediction_type": "nonsense"},
        {"beta_schedule": "nonsense"}, {"trained_betas": [2.0, 3.0]}, {"num_train_timesteps": 0},
    ):  # fmt: skip
        file.write_text(json.dumps({**kept, **change}))
        try:
            families.load(str(folder)).sampling_timesteps(3)
        except UnforgetError as error:
            assert error.hint


UNETS = [
    {"num_class_embeds": 10}, {"class_embed_type": "timestep"}, {"out_channels": 5}, {"in_channels": 9},
    {"sample_size": None}, {"cross_attention_dim": None}, {"attention_head_dim": None}, {"time_cond_proj_dim": 32},
    {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24},
    {"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 8}, {"mid_block_type": None},
    {"only_cross_attention": True},
]  # fmt: skip


@pytest.mark.parametrize("change", UNETS, ids=lambda c: next(iter(c)))
def test_a_unet_of_another_kind_is_refused_or_works(sound, tmp_path, change):
    from diffusers import UNet2DConditionModel

    folder = Path(shutil.copytree(sound / "sd", tmp_path / "model"))
    config = {**json.loads((folder / "unet" / "config.json").read_text()), **change}
    try:
        UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    except Exception:  # not even diffusers makes one
        rewrite(folder / "unet" / "config.json", **change)
    try:
        model = families.load(str(folder))
    except UnforgetError as error:
        assert error.hint
    else:
        x_0 = model.denoise(torch.randn(1, *model.latent_shape), steps=2, prompt_ids=model.prompt_ids(["a red square"]))
        assert x_0.shape[1:] == model.latent_shape


@families_of("sd3")
def test_quantised_parts_are_named(folder):
    for part in (p for p in parts(folder) if p.kind == "model"):
        rewrite(part.home / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
        refused(folder, "quantised weights bitsandbytes")
        config = json.loads((part.home / "config.json").read_text())
        (part.home / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k[:5] != "quant"}))
        file = next(part.home.glob("*.safetensors"))
        tensors, kept = load_file(file), file.read_bytes()
        name = next(n for n, t in tensors.items() if t.dim() > 1)
        for dtype in (torch.float8_e4m3fn, torch.int8, torch.uint8):
            save_file({**tensors, name: tensors[name].to(dtype)}, file, {"format": "pt"})
            refused(folder, "quantised")
        for more in (f"{name}.absmax", "scaled_fp8", f"{name[:-7]}.scale_weight", f"{name}_scale"):
            save_file({**tensors, more: torch.ones(1)}, file, {"format": "pt"})
            refused(folder, "scaled or quantised")
        file.write_bytes(kept)


@families_of("sd", "z-image")
def test_pointers_of_git_are_named(folder):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1\n"
    files = [f for p in parts(folder) if p.loaded for f in [*p.files(), *p.weights().values()]]
    for file in [folder / "model_index.json", *files]:
        kept = file.read_bytes()
        file.write_bytes(pointer)
        with pytest.raises(UnforgetError, match="git-lfs pointer") as caught:
            families.load(str(folder))
        assert "git lfs pull" in caught.value.hint
        file.write_bytes(kept)
    Path("x.safetensors").write_bytes(pointer)
    with pytest.raises(UnforgetError, match="git-lfs pointer"):
        families.load("x.safetensors")


def test_files_that_are_no_model_are_named(tmp_path):
    for names, sentence in (
        (["lora_unet_x.lora_down.weight", "lora_unet_x.alpha"], "is a LoRA"),
        (["transformer.x.lora_A.weight", "transformer.x.lora_B.weight"], "is a LoRA"),
        (["model.diffusion_model.joint_blocks.0.x", "scaled_fp8"], "scaled"),
        (["model.diffusion_model.joint_blocks.0.x.scale_weight"], "scaled"),
    ):
        save_file({name: torch.ones(1) for name in names}, tmp_path / "x.safetensors")
        with pytest.raises((UsageError, CannotRun), match=sentence):
            families.load(str(tmp_path / "x.safetensors"))
    for name in ("adapter_config.json", "pytorch_lora_weights.safetensors"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(UsageError, match="is a LoRA"):
            families.load(str(tmp_path))
        (tmp_path / name).unlink()


def test_an_alias_beats_a_folder_of_its_name_with_a_word(sound, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = []
    families.load("faces", families.Options(note=said.append))
    assert not said
    shutil.copytree(sound / "ddpm", "faces")
    families.load("faces", families.Options(note=said.append))
    assert len(said) == 1 and "./faces" in said[0]
    assert families.load("./faces").image_shape == (3, 16, 16)


@families_of("sd", "sd3")
def test_a_tokenizer_without_a_limit_reads_what_its_encoder_does(folder):
    for file in folder.rglob("tokenizer_config.json"):
        rewrite(file, model_max_length=int(1e30))
    families.load(str(folder)).prompt_ids(["a red square"])
