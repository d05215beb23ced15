"""Original layouts of single files, against diffusers' own readers of them."""

import copy
import shutil
import socket

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
    create_diffusers_clip_model_from_ldm,
    create_diffusers_t5_model_from_checkpoint,
)
from pipelines import CAPTIONS, narrow_flux, tiny_flux, tiny_sd2, tiny_sd3
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from unforget import families
from unforget.errors import CannotRun, UsageError
from unforget.families.layouts import Piece, grouped, to_diffusers, to_original
from unforget.families.layouts import flux as flux_layout
from unforget.families.layouts import sd3 as sd3_layout
from unforget.families.layouts import unet as unet_layout

SMALL = {
    "sample_size": 8, "patch_size": 2, "in_channels": 16, "out_channels": 16, "attention_head_dim": 4,
    "num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 8, "pooled_projection_dim": 6,
}  # fmt: skip
ARCHITECTURES = {
    "sd3-medium": {"num_layers": 24, "pos_embed_max_size": 192},  # its config.json knows nothing of the later options
    "sd3.5-medium": {
        "num_layers": 24, "pos_embed_max_size": 384, "dual_attention_layers": list(range(13)), "qk_norm": "rms_norm",
    },
    "sd3.5-large": {
        "num_layers": 38, "pos_embed_max_size": 192, "dual_attention_layers": [], "qk_norm": "rms_norm",
    },
}  # fmt: skip
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [4, 8, 16, 16], "layers_per_block": 2, "latent_channels": 16, "norm_num_groups": 4,
    "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip


class Shapes(dict):
    """Names and shapes of an original, written as its own code builds it."""

    def layer(self, name, *shape):
        self[f"{name}.weight"], self[f"{name}.bias"] = shape, shape[:1]

    def random(self, dtype=torch.float16):
        generator = torch.Generator().manual_seed(0)
        return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in self.items()}


def mmdit(config) -> Shapes:
    """`MMDiTX` of Stability's mmditx.py."""
    shapes, depth, head = Shapes(), config["num_layers"], config["attention_head_dim"]
    d = head * config["num_attention_heads"]
    top = "model.diffusion_model"
    shapes[f"{top}.pos_embed"] = 1, config["pos_embed_max_size"] ** 2, d
    shapes.layer(f"{top}.x_embedder.proj", d, 16, 2, 2)
    shapes.layer(f"{top}.context_embedder", d, config["joint_attention_dim"])
    for name, width in (("t_embedder", 256), ("y_embedder", config["pooled_projection_dim"])):
        shapes.layer(f"{top}.{name}.mlp.0", d, width)
        shapes.layer(f"{top}.{name}.mlp.2", d, d)
    for i in range(depth):
        for stream in ("x_block", "context_block"):
            block = f"{top}.joint_blocks.{i}.{stream}"
            pre_only = stream == "context_block" and i == depth - 1
            dual = stream == "x_block" and i in config.get("dual_attention_layers", [])
            shapes.layer(f"{block}.adaLN_modulation.1", (2 if pre_only else 9 if dual else 6) * d, d)
            for attention in ("attn", "attn2") if dual else ("attn",):
                shapes.layer(f"{block}.{attention}.qkv", 3 * d, d)
                if config.get("qk_norm"):
                    shapes[f"{block}.{attention}.ln_q.weight"] = shapes[f"{block}.{attention}.ln_k.weight"] = (head,)
                if not pre_only:
                    shapes.layer(f"{block}.{attention}.proj", d, d)
            if not pre_only:
                shapes.layer(f"{block}.mlp.fc1", 4 * d, d)
                shapes.layer(f"{block}.mlp.fc2", d, 4 * d)
    shapes.layer(f"{top}.final_layer.adaLN_modulation.1", 2 * d, d)
    shapes.layer(f"{top}.final_layer.linear", 64, d)
    return shapes


FLUX = {
    "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768, "axes_dims_rope": (16, 56, 56),
}  # fmt: skip


def flux(guidance) -> Shapes:
    """`Flux` of Black Forest Labs' model.py with as many rows as the released ones have, and two columns."""
    shapes, d = Shapes(), 3072
    for name in ("time_in", "vector_in", "guidance_in") if guidance else ("time_in", "vector_in"):
        shapes.layer(f"{name}.in_layer", d, 2)
        shapes.layer(f"{name}.out_layer", d, 2)
    shapes.layer("img_in", d, 2)
    shapes.layer("txt_in", d, 2)
    for i in range(19):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            shapes.layer(f"{block}_mod.lin", 6 * d, 2)
            shapes.layer(f"{block}_attn.qkv", 3 * d, 2)
            shapes[f"{block}_attn.norm.query_norm.scale"] = shapes[f"{block}_attn.norm.key_norm.scale"] = (128,)
            shapes.layer(f"{block}_attn.proj", d, 2)
            shapes.layer(f"{block}_mlp.0", 4 * d, 2)
            shapes.layer(f"{block}_mlp.2", d, 2)
    for i in range(38):
        block = f"single_blocks.{i}"
        shapes.layer(f"{block}.linear1", 7 * d, 2)
        shapes.layer(f"{block}.linear2", d, 2)
        shapes[f"{block}.norm.query_norm.scale"] = shapes[f"{block}.norm.key_norm.scale"] = (128,)
        shapes.layer(f"{block}.modulation.lin", 3 * d, 2)
    shapes.layer("final_layer.linear", 64, 2)
    shapes.layer("final_layer.adaLN_modulation.1", 2 * d, 2)
    return shapes


def autoencoder(config) -> Shapes:
    """`VAEEncoder` and `VAEDecoder` of Stability's sd3_impls.py."""
    shapes, widths = Shapes(), config["block_out_channels"]
    latent, deepest, last = config["latent_channels"], config["block_out_channels"][-1], len(widths) - 1

    def resnet(name, before, after):
        shapes.layer(f"{name}.norm1", before)
        shapes.layer(f"{name}.conv1", after, before, 3, 3)
        shapes.layer(f"{name}.norm2", after)
        shapes.layer(f"{name}.conv2", after, after, 3, 3)
        if before != after:
            shapes.layer(f"{name}.nin_shortcut", after, before, 1, 1)
        return after

    for side in ("first_stage_model.encoder", "first_stage_model.decoder"):
        down = side.endswith("encoder")
        width = widths[0] if down else deepest
        shapes.layer(f"{side}.conv_in", width, 3 if down else latent, 3, 3)
        for i in range(len(widths)) if down else reversed(range(len(widths))):
            level = f"{side}.{'down' if down else 'up'}.{i}"
            for j in range(config["layers_per_block"] + (not down)):
                width = resnet(f"{level}.block.{j}", width, widths[i])
            if i != (last if down else 0):
                shapes.layer(f"{level}.{'down' if down else 'up'}sample.conv", width, width, 3, 3)
        resnet(f"{side}.mid.block_1", deepest, deepest)
        shapes.layer(f"{side}.mid.attn_1.norm", deepest)
        for name in ("q", "k", "v", "proj_out"):
            shapes.layer(f"{side}.mid.attn_1.{name}", deepest, deepest, 1, 1)
        resnet(f"{side}.mid.block_2", deepest, deepest)
        shapes.layer(f"{side}.norm_out", width)
        shapes.layer(f"{side}.conv_out", 2 * latent if down else 3, width, 3, 3)
    return shapes


def read(layout, checkpoint):
    return {name: to_diffusers(piece, checkpoint[piece.original]) for name, piece in layout.items()}


def written(layout, weights):
    return {
        name: to_original([(layout[n], weights[n]) for n in reversed(names)])  # any order does
        for name, names in grouped(layout).items()
    }


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def shapes_of(weights):
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def meta(cls, config):
    with torch.device("meta"):
        return cls.from_config(config).state_dict()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_transformer_there_and_back(name):
    config = SMALL | ARCHITECTURES[name]
    checkpoint, layout = mmdit(config).random(), sd3_layout.transformer(meta(SD3Transformer2DModel, config))
    weights = read(layout, checkpoint)
    assert_same(weights, convert_sd3_transformer_checkpoint_to_diffusers(dict(checkpoint)))  # it empties what it gets
    assert shapes_of(weights) == shapes_of(meta(SD3Transformer2DModel, config))
    back = written(layout, weights)
    assert_same(back, checkpoint)
    assert all(tensor.is_contiguous() for tensor in back.values())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("guidance", [True, False], ids=["dev", "schnell"])
def test_flux_there_and_back(guidance, prefix):
    checkpoint = {prefix + name: tensor for name, tensor in flux(guidance).random(torch.bfloat16).items()}
    assert flux_layout.LAYOUT.is_in(checkpoint)
    state = meta(FluxTransformer2DModel, FLUX | {"guidance_embeds": guidance})
    layout = flux_layout.LAYOUT.pieces(state, checkpoint)
    weights = read(layout, checkpoint)
    assert_same(weights, convert_flux_transformer_checkpoint_to_diffusers(dict(checkpoint)))
    assert {n: len(t) for n, t in weights.items()} == {n: len(t) for n, t in state.items()}
    assert_same(written(layout, weights), checkpoint)


@pytest.mark.parametrize("widths", [[4, 8, 16, 16], [8, 8, 8, 8], [4, 8]])
def test_the_vae_there_and_back(widths):
    n = len(widths)
    config = VAE | {
        "block_out_channels": widths, "down_block_types": VAE["down_block_types"][:n],
        "up_block_types": VAE["up_block_types"][:n],
    }  # fmt: skip
    checkpoint, layout = autoencoder(config).random(), sd3_layout.vae(meta(AutoencoderKL, config))
    weights = read(layout, checkpoint)
    assert_same(weights, convert_ldm_vae_checkpoint(dict(checkpoint), config))
    assert shapes_of(weights) == shapes_of(meta(AutoencoderKL, config))
    assert_same(written(layout, weights), checkpoint)


UNETS = {
    "Stable Diffusion 1.5": (686, {"sample_size": 64, "block_out_channels": [4, 8, 16, 16]}),
    "Stable Diffusion XL": (1680, {
        "block_out_channels": [4, 8, 16], "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": True,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 30,
    }),
}  # fmt: skip
"""How many tensors the released networks have, and their configurations at small widths."""


@pytest.mark.parametrize("name", UNETS)
def test_the_unet_there_and_back(name):
    count, config = UNETS[name]
    config = {"cross_attention_dim": 8, "attention_head_dim": 2, "norm_num_groups": 2, "layers_per_block": 2} | config
    torch.manual_seed(0)
    weights = UNet2DConditionModel.from_config(config).state_dict()
    layout = unet_layout.network(weights)
    checkpoint = written(layout, weights)
    assert len(checkpoint) == count
    assert "model.diffusion_model.output_blocks.5.2.conv.weight" in checkpoint
    assert "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight" in checkpoint
    assert_same(convert_ldm_unet_checkpoint(dict(checkpoint), config), weights)
    assert_same(read(layout, checkpoint), weights)
    with pytest.raises(CannotRun, match="no place for"):
        unet_layout.network([*weights, "down_blocks.0.motion_modules.0.proj_in.weight"])


PARTS = {1: "text_encoder", 2: "text_encoder_2"}


@pytest.mark.parametrize("quant", [False, True])
@pytest.mark.parametrize("attention", [False, True])
def test_the_vae_has_what_its_configuration_says(quant, attention):
    config = VAE | {"use_quant_conv": quant, "use_post_quant_conv": quant, "mid_block_add_attention": attention}
    torch.manual_seed(0)
    weights = AutoencoderKL.from_config(config).state_dict()
    checkpoint = written(sd3_layout.vae(weights), weights)
    assert_same(convert_ldm_vae_checkpoint(dict(checkpoint), config), weights)


def clip(width):
    torch.manual_seed(width)
    return CLIPTextConfig(
        vocab_size=20, hidden_size=width, intermediate_size=16, projection_dim=8, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip


def saved(model, folder):
    """The names and weights of the file that transformers writes."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def test_the_two_clips_are_what_diffusers_reads(tmp_path):
    folders = {which: tmp_path / str(which) for which in (1, 2)}
    files = {which: saved(CLIPTextModelWithProjection(clip(8 * which)), folders[which]) for which in (1, 2)}
    layouts = {which: sd3_layout.text_encoder(PARTS[which], files[which]) for which in (1, 2)}
    checkpoint = written(layouts[1], files[1]) | written(layouts[2], files[2])
    assert "text_encoders.clip_g.transformer.text_projection.weight" in checkpoint
    for which in (1, 2):
        assert_same(read(layouts[which], checkpoint), files[which])
        theirs = create_diffusers_clip_model_from_ldm(
            CLIPTextModelWithProjection, checkpoint, config=str(folders[which]), local_files_only=True
        ).state_dict()
        if which == 1:  # stock puts an identity there
            assert torch.equal(theirs.pop("text_projection.weight"), torch.eye(8))
            del files[1]["text_projection.weight"]
        assert_same(files[which], theirs)


def test_a_clip_without_the_wrapper_has_the_same_original(tmp_path):
    weights = saved(CLIPTextModel(clip(8)), tmp_path)
    layout = sd3_layout.text_encoder("text_encoder", weights)
    wrapped = sd3_layout.text_encoder("text_encoder", CLIPTextModelWithProjection(clip(8)).state_dict())
    projection = "text_encoders.clip_l.transformer.text_projection.weight"
    assert {p.original for p in layout.values()} == {p.original for p in wrapped.values()} - {projection}
    theirs = create_diffusers_clip_model_from_ldm(
        CLIPTextModel, written(layout, weights), config=str(tmp_path), local_files_only=True
    )
    assert_same(weights, theirs.state_dict())


def test_t5_is_what_diffusers_reads(tmp_path):
    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
    )).eval()  # fmt: skip
    weights = saved(model, tmp_path)
    layout = sd3_layout.text_encoder("text_encoder_3", weights)
    checkpoint = written(layout, weights)
    prefix = "text_encoders.t5xxl.transformer."
    assert "encoder.embed_tokens.weight" not in weights
    assert torch.equal(checkpoint[prefix + "shared.weight"], checkpoint[prefix + "encoder.embed_tokens.weight"])
    assert_same(read(layout, checkpoint), weights)
    whole = sd3_layout.text_encoder("text_encoder_3", model.state_dict())  # both names, no copy
    assert_same(written(whole, model.state_dict()), checkpoint)

    def opened(checkpoint):
        return create_diffusers_t5_model_from_checkpoint(
            T5EncoderModel, checkpoint, config=str(tmp_path), local_files_only=True
        ).eval()

    theirs = opened(checkpoint)
    assert_same(model.state_dict(), theirs.state_dict())
    tokens = torch.tensor([[3, 4, 1]])
    with torch.no_grad():
        assert torch.equal(model(tokens).last_hidden_state, theirs(tokens).last_hidden_state)
    del checkpoint[prefix + "encoder.embed_tokens.weight"]  # why it is written twice
    assert opened(checkpoint).encoder.embed_tokens.weight.is_meta


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def pipeline():
    """Stock tells the text encoders of a file apart by their width, so one is wider, and clip_l projects nothing."""
    made = tiny_sd3()
    config = copy.deepcopy(made.text_encoder_2.config)  # both have the same
    config.hidden_size = 16
    made.text_encoder_2 = CLIPTextModelWithProjection(config)
    torch.nn.init.eye_(made.text_encoder.text_projection.weight)
    return made


@pytest.fixture(scope="module")
def single(pipeline, tmp_path_factory):
    """The pipeline as a folder of configurations, without weights, and as one file."""
    folder = tmp_path_factory.mktemp("original")
    pipeline.save_pretrained(folder / "config")
    for weights in (folder / "config").rglob("*.safetensors"):
        weights.unlink()
    parts = {
        "transformer": sd3_layout.transformer(pipeline.transformer.state_dict()),
        "vae": sd3_layout.vae(pipeline.vae.state_dict()),
        "text_encoder": sd3_layout.text_encoder("text_encoder", pipeline.text_encoder.state_dict()),
        "text_encoder_2": sd3_layout.text_encoder("text_encoder_2", pipeline.text_encoder_2.state_dict()),
    }
    checkpoint = {}
    for name, layout in parts.items():
        checkpoint |= written(layout, getattr(pipeline, name).state_dict())
    save_file(checkpoint, folder / "model.safetensors")
    return folder


def test_stock_opens_the_transformer_of_a_file(pipeline, single, offline):
    opened = SD3Transformer2DModel.from_single_file(
        str(single / "model.safetensors"), config=str(single / "config"), subfolder="transformer", local_files_only=True
    )
    assert_same(opened.state_dict(), pipeline.transformer.state_dict())


def test_stock_opens_the_whole_file(pipeline, single, offline):
    absent = {"text_encoder_3": None, "tokenizer_3": None}  # stock asks for it, though the index has null there
    opened = StableDiffusion3Pipeline.from_single_file(
        str(single / "model.safetensors"), config=str(single / "config"), local_files_only=True, **absent
    )
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        assert_same(getattr(opened, name).state_dict(), getattr(pipeline, name).state_dict())
    assert opened.text_encoder_3 is None
    drawn = []
    for each in (pipeline, opened):
        each.set_progress_bar_config(disable=True)
        latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
        drawn.append(each(CAPTIONS[0], latents=latents, num_inference_steps=2, output_type="pt").images)
    torch.testing.assert_close(*drawn)  # not to the bit: mapped weights lie elsewhere, and kernels differ by that


@pytest.fixture(scope="module")
def flux_pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    made = tiny_flux()
    made.save_pretrained(folder)
    return made, folder


@pytest.mark.parametrize("alone", [False, True])
def test_flux_as_a_file(flux_pipeline, alone, tmp_path, monkeypatch, offline):
    """With all parts, or the network alone: then the others come from the folder."""
    narrow_flux(monkeypatch)
    (made, folder), layout = flux_pipeline, flux_layout.LAYOUT
    state = made.transformer.state_dict()
    checkpoint = written(layout.pieces(state, ["double_blocks.0.img_mod.lin.bias"] if alone else []), state)
    assert any(name.startswith("model.") for name in checkpoint) != alone
    if not alone:
        checkpoint |= written(layout.vae(made.vae.state_dict()), made.vae.state_dict())
        for name in layout.text_encoders:
            weights = getattr(made, name).state_dict()
            checkpoint |= written(layout.text_encoder(name, weights), weights)
    path, how = tmp_path / "flux.safetensors", {"config": str(folder), "local_files_only": True}
    save_file({name: tensor.clone() for name, tensor in checkpoint.items()}, path)
    theirs = FluxTransformer2DModel.from_single_file(str(path), subfolder="transformer", **how)
    assert_same(theirs.state_dict(), state)
    ours = families.load(str(path), families.Options(resolution=16, pipeline_config=folder))
    opened = [ours.pipeline] if alone else [ours.pipeline, FluxPipeline.from_single_file(str(path), **how)]
    for pipeline in opened:
        for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
            assert_same(getattr(pipeline, name).state_dict(), getattr(made, name).state_dict())
    if alone:
        bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
        with pytest.raises(CannotRun, match="holds no vae"):
            families.load(str(path), families.Options(pipeline_config=bare))


def test_text_encoders_in_files_of_their_own(flux_pipeline, tmp_path, monkeypatch, offline):
    """As ComfyUI keeps them: clip_l without a projection or a word on its format, T5 under `shared.weight` alone."""
    narrow_flux(monkeypatch)
    (made, folder), layout = flux_pipeline, flux_layout.LAYOUT
    state = made.transformer.state_dict()
    path = tmp_path / "flux.safetensors"
    save_file(written(layout.pieces(state, ["double_blocks.0.img_mod.lin.bias"]), state), path)
    bare = shutil.copytree(folder, tmp_path / "bare")
    files = []
    for name in ("text_encoder_2", "text_encoder"):
        stored = bare / name / "model.safetensors"
        tensors = load_file(stored)
        files.append(tmp_path / f"{name}.safetensors")
        save_file({n: t for n, t in tensors.items() if n != "encoder.embed_tokens.weight"}, files[-1])
        stored.unlink()
    how = {"resolution": 16, "pipeline_config": bare}
    with pytest.raises(CannotRun, match="holds no text_encoder") as caught:
        families.load(str(path), families.Options(**how))
    assert "--text-encoder" in caught.value.hint
    ours = families.load(str(path), families.Options(**how, text_encoder=tuple(files)))
    for name in ("text_encoder", "text_encoder_2"):
        assert_same(getattr(ours.pipeline, name).state_dict(), getattr(made, name).state_dict())
        assert not getattr(ours.pipeline, name).training
    with pytest.raises(UsageError, match="is no single file"):
        families.load(str(folder), families.Options(text_encoder=tuple(files)))
    other = tmp_path / "other.safetensors"
    for tensors, what in (
        ({"shared.weight": torch.zeros(3, 5)}, "no text encoder that this model lacks"),
        ({}, "no text encoder that this model lacks"),
        (load_file(files[0]) | {"encoder.final_layer_norm.weight": torch.zeros(3)}, "wanted"),
        (load_file(files[0]) | {"scaled_fp8": torch.zeros(1)}, "scaled or quantised"),
        ({"shared.weight": load_file(files[0])["shared.weight"]}, "lacks"),
    ):
        save_file(tensors, other)
        with pytest.raises((UsageError, CannotRun), match=what):
            families.load(str(path), families.Options(**how, text_encoder=(other, files[1])))
    other.write_bytes(b"no tensors")
    with pytest.raises(UsageError, match="cannot be opened"):
        families.load(str(path), families.Options(**how, text_encoder=(other, files[1])))


def test_a_missing_projection_is_the_identity(single, pipeline, tmp_path, offline):
    """Stability's clip_l of SD3 has none."""
    held = {n: t for n, t in load_file(single / "model.safetensors").items() if not n.startswith("text_encoders.")}
    path, bare = tmp_path / "sd3.safetensors", shutil.copytree(single / "config", tmp_path / "bare")
    save_file(held, path)
    for name in ("text_encoder", "text_encoder_2"):
        getattr(pipeline, name).save_pretrained(tmp_path / name)
    clip_l = load_file(tmp_path / "text_encoder" / "model.safetensors")
    torch.testing.assert_close(clip_l["text_projection.weight"], torch.eye(len(clip_l["text_projection.weight"])))
    files = (tmp_path / "clip_l.safetensors", tmp_path / "text_encoder_2" / "model.safetensors")
    save_file({n: t for n, t in clip_l.items() if n != "text_projection.weight"}, files[0])
    ours = families.load(str(path), families.Options(resolution=16, pipeline_config=bare, text_encoder=files, t5=False))
    for name in ("text_encoder", "text_encoder_2"):
        assert_same(getattr(ours.pipeline, name).state_dict(), getattr(pipeline, name).state_dict())


def test_a_file_of_2_x_brings_its_own_text_encoder(tmp_path, offline):
    """OpenCLIP's names, with a last layer that diffusers leaves out; the folder beside it has other weights."""
    made, folder, layout = tiny_sd2(), tmp_path / "folder", unet_layout.SD_LAYOUT
    made.save_pretrained(folder)
    for part in (made.unet, made.vae, made.text_encoder):
        for p in part.parameters():
            torch.nn.init.normal_(p, std=0.1)
    text = made.text_encoder.state_dict()
    open_clip = {"text_projection": torch.eye(8), "transformer.resblocks.2.ln_1.bias": torch.zeros(8)}
    checkpoint = {
        **written(layout.network(made.unet.state_dict()), made.unet.state_dict()),
        **written(layout.vae(made.vae.state_dict()), made.vae.state_dict()),
        **written(unet_layout.open_clip("cond_stage_model.model.", text), text),
        **{f"cond_stage_model.model.{name}": tensor for name, tensor in open_clip.items()},
    }
    path = tmp_path / "v2.safetensors"
    save_file({name: tensor.clone() for name, tensor in checkpoint.items()}, path)
    ours = families.load(str(path), families.Options(resolution=16, pipeline_config=folder))
    for name in ("unet", "vae", "text_encoder"):
        assert_same(getattr(ours.pipeline, name).state_dict(), getattr(made, name).state_dict())
    with torch.no_grad():
        said = [p.encode_prompt(CAPTIONS[0], "cpu", 1, False)[0] for p in (ours.pipeline, made)]
    torch.testing.assert_close(*said)


@pytest.mark.parametrize(("names", "kind"), [
    ({"model.diffusion_model.double_blocks.0.img_mod.lin.weight", "vae.x"}, "flux"),
    ({"double_blocks.0.img_mod.lin.weight"}, "flux"),
    ({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "text_encoders.clip_l.transformer.x"}, "sd3"),
    ({"model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.x"}, "sd"),
    ({"model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.model.x"}, "sd"),
    ({"model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.x"}, "sdxl"),
    # FLUX.2, Chroma, HunyuanVideo and FLUX.1 under diffusers' names
    ({"double_blocks.0.img_attn.norm.key_norm.scale", "double_stream_modulation_img.lin.weight"}, ""),
    ({"double_blocks.0.img_attn.norm.key_norm.scale", "distilled_guidance_layer.in_proj.bias"}, ""),
    ({"double_blocks.0.img_mod.linear.weight", "txt_in.t_embedder.mlp.0.bias"}, ""),
    ({"transformer_blocks.0.norm1.linear.weight"}, ""),
])  # fmt: skip
def test_the_family_of_a_file_is_told_by_its_names(names, kind, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({name: torch.zeros(1) for name in names}, path)
    assert [s.name for s in families.FAMILIES if s.layout is not None and s.layout.is_in(names)] == [kind] * bool(kind)
    if kind:
        assert families.spec_of(str(path)).name == kind
    else:
        with pytest.raises(UsageError, match="a checkpoint of no family"):
            families.spec_of(str(path))


def test_a_flux_of_another_width_is_refused(flux_pipeline):
    with pytest.raises(CannotRun, match="is 3072 wide, this one 16"):
        flux_layout.LAYOUT.check("network", flux_pipeline[0].transformer.state_dict())


def test_parts_come_whole_and_alike():
    q, k, v = (Piece("qkv", (i, 3)) for i in range(3))
    ones = torch.ones(2, 2)
    assert to_original([(v, ones * 3), (q, ones), (k, ones * 2)])[:, 0].tolist() == [1, 1, 2, 2, 3, 3]
    assert to_original([(Piece("o"), torch.ones(2, 3).T)]).is_contiguous()
    for bad in ([(q, ones), (k, ones)], [(q, ones), (k, ones), (k, ones)], [(q, ones), (k, ones), (Piece("o"), ones)]):
        with pytest.raises(CannotRun, match="needs 3 parts"):
            to_original(bad)
    for other in (ones.half(), ones[:1]):
        with pytest.raises(CannotRun, match="differ in shape or dtype"):
            to_original([(q, ones), (k, ones), (v, other)])
    with pytest.raises(CannotRun, match="not 3 equal parts"):
        to_diffusers(q, ones)
    wide = Piece("qkv", (1, 3), width=2)
    both = to_original([(wide, torch.cat([ones * 2, ones * 3])), (q, ones)])
    assert both[:, 0].tolist() == [1, 1, 2, 2, 3, 3]
    assert torch.equal(to_diffusers(wide, both), both[2:])
    for bad in ([(wide, ones)], [(q, ones), (k, ones), (wide, both[2:])]):
        with pytest.raises(CannotRun, match="needs 3 parts"):
            to_original(bad)
    with pytest.raises(CannotRun, match="differ in shape"):
        to_original([(q, ones), (wide, ones)])
    with pytest.raises(CannotRun, match="not 2 equal parts"):
        to_diffusers(Piece("adaLN", swapped=True), torch.ones(3))


def test_what_the_original_does_not_know_is_refused():
    config = SMALL | {"num_layers": 2, "qk_norm": "layer_norm"}
    with pytest.raises(CannotRun, match=r"no place for 'transformer_blocks\.0\.attn\.norm_q\.bias'"):
        sd3_layout.transformer(meta(SD3Transformer2DModel, config))
    for name in ("x", "transformer_blocks.0.attn.norm_q.bias", "single_transformer_blocks.0.ff.net.2.weight"):
        with pytest.raises(CannotRun, match=f"no place for '{name}'"):
            flux_layout.transformer([name])
    with pytest.raises(CannotRun, match="no place for 'x'"):
        sd3_layout.transformer(["x"])
    config = VAE | {"down_block_types": ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"]}
    with pytest.raises(CannotRun, match=r"no place for 'encoder\.down_blocks\.3\.attentions"):
        sd3_layout.vae(meta(AutoencoderKL, config))
