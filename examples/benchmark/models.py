"""What each model that people have would cost: counted from its own configuration on torch's meta device.

    python examples/benchmark/models.py [WORD ...]   # the table of docs/models.md, or models with a word in their name

For every model the memory of a run with the defaults and the network passes of `unlearn` and `verify --level standard`
at the model's own size, with one prompt where it takes prompts, as `--dry-run` says them.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tables import row, table

from unforget import UnlearnConfig, VerifyConfig, api, families
from unforget.families import offload
from unforget.families.memory import blueprint

GIB = 2**30
Parts = dict[str, dict[str, Any]]

VAE = {
    "_class_name": "AutoencoderKL", "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
    "latent_channels": 4, "sample_size": 512,
}  # fmt: skip
WIDE = {**VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "sample_size": 1024}
BETAS = {
    "_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    "steps_offset": 1,
}  # fmt: skip
SD: dict[str, Any] = {"_class_name": "UNet2DConditionModel", "sample_size": 64, "cross_attention_dim": 768}
SD2 = {**SD, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
SDXL = {
    **SD2, "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SD3: dict[str, Any] = {
    "_class_name": "SD3Transformer2DModel", "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16,
    "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
}  # fmt: skip
SD35 = {**SD3, "qk_norm": "rms_norm", "pos_embed_max_size": 384, "dual_attention_layers": list(range(13))}
SD35_LARGE = {
    **SD3, "qk_norm": "rms_norm", "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
}  # fmt: skip
FLUX = {
    "_class_name": "FluxTransformer2DModel", "in_channels": 64, "num_layers": 19, "num_single_layers": 38,
    "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
    "guidance_embeds": True,
}  # fmt: skip
KLEIN = {
    "_class_name": "Flux2Transformer2DModel", "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24,
    "joint_attention_dim": 7680, "guidance_embeds": False,
}  # fmt: skip
PIXART = {
    "_class_name": "Transformer2DModel", "norm_type": "ada_norm_single", "attention_bias": True, "num_layers": 28,
    "num_attention_heads": 16, "attention_head_dim": 72, "cross_attention_dim": 1152, "caption_channels": 4096,
    "in_channels": 4, "out_channels": 8, "patch_size": 2, "sample_size": 128, "interpolation_scale": 2,
    "num_embeds_ada_norm": 1000, "activation_fn": "gelu-approximate", "norm_elementwise_affine": False,
    "norm_eps": 1e-6, "use_additional_conditions": False,
}  # fmt: skip
DPM = {"_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
FLUX_VAE = {**WIDE, "shift_factor": 0.1159, "scaling_factor": 0.3611}
VAE2 = {**VAE, "latent_channels": 32, "sample_size": 1024}
SD3_VAE = {**WIDE, "shift_factor": 0.0609, "scaling_factor": 1.5305}
SANA: dict[str, Any] = {"_class_name": "SanaTransformer2DModel"}
DC: dict[str, Any] = {
    "_class_name": "AutoencoderDC", "scaling_factor": 0.41407, "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate", "encoder_block_types": [*["ResBlock"] * 3, *["EfficientViTBlock"] * 3],
    "decoder_block_types": [*["ResBlock"] * 3, *["EfficientViTBlock"] * 3],
}  # fmt: skip
SOLVER = {
    "_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True,
    "flow_shift": 3.0,
}  # fmt: skip
PIXELS: dict[str, Any] = {
    "_class_name": "UNet2DModel", "sample_size": 256, "layers_per_block": 2,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
}  # fmt: skip
LDM: dict[str, Any] = {
    "_class_name": "UNet2DModel", "sample_size": 64, "layers_per_block": 2, "attention_head_dim": 32,
    "block_out_channels": [224, 448, 672, 896], "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3],
    "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"],
}  # fmt: skip
DIT: dict[str, Any] = {"_class_name": "DiTTransformer2DModel", "out_channels": 8}
VQ = {
    "_class_name": "VQModel", "block_out_channels": [128, 256, 512], "layers_per_block": 2, "latent_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
    "num_vq_embeddings": 8192, "vq_embed_dim": 3,
}  # fmt: skip
CLIP_L: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
CLIP_G = {**CLIP_L, "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
OPEN_CLIP = {
    **CLIP_G,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
}
T5: dict[str, Any] = {
    "d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
QWEN: dict[str, Any] = {
    "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_key_value_heads": 8,
    "head_dim": 128, "tie_word_embeddings": True,
}  # fmt: skip
THREE = (CLIP_L, CLIP_G, T5)
READERS: dict[str, tuple[dict[str, Any], ...]] = {
    "StableDiffusionXLPipeline": (CLIP_L, CLIP_G), "StableDiffusion3Pipeline": THREE, "FluxPipeline": (CLIP_L, T5),
    "Flux2KleinPipeline": (QWEN,), "ZImagePipeline": (QWEN,), "SanaPipeline": ({},), "PixArtSigmaPipeline": (T5,),
}  # fmt: skip
"""The text encoders of each pipeline; `Gemma2Config` is that of 2 B."""
MODELS: dict[str, tuple[str, Parts]] = {
    "DDPM CelebA-HQ": ("DDPMPipeline", {"unet": PIXELS, "scheduler": {"_class_name": "DDPMScheduler"}}),
    "LDM CelebA-HQ": ("LDMPipeline", {"unet": LDM, "vqvae": VQ, "scheduler": BETAS}),
    "DiT-XL/2": ("DiTPipeline", {"transformer": DIT, "vae": VAE, "scheduler": {"_class_name": "DDIMScheduler"}}),
    "Stable Diffusion 1.5": ("StableDiffusionPipeline", {"unet": SD, "vae": VAE, "scheduler": BETAS}),
    "Stable Diffusion 2.1": (
        "StableDiffusionPipeline",
        {"unet": {**SD2, "sample_size": 96}, "vae": VAE, "scheduler": {**BETAS, "prediction_type": "v_prediction"}},
    ),
    "Stable Diffusion XL": ("StableDiffusionXLPipeline", {"unet": SDXL, "vae": VAE, "scheduler": BETAS}),
    "Stable Diffusion 3 medium": (
        "StableDiffusion3Pipeline",
        {"transformer": SD3, "vae": SD3_VAE, "scheduler": FLOW},
    ),
    "Stable Diffusion 3.5 medium": (
        "StableDiffusion3Pipeline",
        {"transformer": SD35, "vae": SD3_VAE, "scheduler": FLOW},
    ),
    "Stable Diffusion 3.5 large": (
        "StableDiffusion3Pipeline",
        {"transformer": SD35_LARGE, "vae": SD3_VAE, "scheduler": FLOW},
    ),
    "FLUX.1 dev": (
        "FluxPipeline",
        {"transformer": FLUX, "vae": FLUX_VAE, "scheduler": {**FLOW, "use_dynamic_shifting": True}},
    ),
    "FLUX.1 schnell": (
        "FluxPipeline",
        {
            "transformer": {**FLUX, "guidance_embeds": False}, "vae": FLUX_VAE, "scheduler": {**FLOW, "shift": 1.0},
        },
    ),
    "FLUX.2 klein 4B": (
        "Flux2KleinPipeline",
        {"transformer": KLEIN, "vae": {**VAE2, "_class_name": "AutoencoderKLFlux2"}, "scheduler": FLOW},
    ),
    "Z-Image": (
        "ZImagePipeline",
        {"transformer": {"_class_name": "ZImageTransformer2DModel"}, "vae": FLUX_VAE, "scheduler": FLOW},
    ),
    "Sana 1.6B": ("SanaPipeline", {"transformer": SANA, "vae": DC, "scheduler": SOLVER}),
    "PixArt-Sigma": (
        "PixArtSigmaPipeline",
        {"transformer": PIXART, "vae": {**VAE, "scaling_factor": 0.13025}, "scheduler": DPM},
    ),
}  # fmt: skip
"""Pipelines and the `config.json` of their parts, as their repositories have them."""


def configured(name: str, folder: Path) -> Path:
    """A model's configuration files alone, in a folder."""
    pipeline, parts = MODELS[name]
    readers = (OPEN_CLIP if " 2" in name else CLIP_L,) if "DiffusionPipeline" in pipeline else READERS.get(pipeline, ())
    parts = parts | {f"text_encoder_{i}" if i > 1 else "text_encoder": c for i, c in enumerate(readers, 1)}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    for part, config in parts.items():
        (folder / part).mkdir()
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part / file).write_text(json.dumps(config))
    return folder


def main() -> None:
    table(
        "model", "pixels", "weights, B", "prompts, GiB", "layer by layer", "memory, GiB", "all kept", "on the host",
        "`unlearn`, passes", "`verify`, passes",
    )  # fmt: skip
    for name in (n for n in MODELS if not sys.argv[1:] or any(word in n for word in sys.argv[1:])):
        with tempfile.TemporaryDirectory() as scratch:
            folder = str(configured(name, Path(scratch)))
            prompted = families.spec_of(folder).prompted
            asked = {"model": folder, "target": "x.png", **({"prompt": "a flag"} if prompted else {})}
            found = blueprint(folder, families.Options())
            plans = [
                api.plan_unlearn(UnlearnConfig(**asked, output="x.patch", gradient_checkpointing=again))
                for again in ((True, False) if prompted else (False,))
            ]
            judged = api.plan_verify(VerifyConfig(**asked, candidate=folder))
        size = sum(p.numel() for p in found.network.parameters()) / 1e9
        _, come = offload.resident(found.network)
        spared = come - come // found.spec.blocks(found.network.config)
        elsewhere = ("peak", "embedding", "preconditioner")
        training = [sum(v for k, v in p["memory_gib"].items() if k not in elsewhere) for p in plans]
        embedding = f"{(found.encoders + found.beside) / GIB + 0.5:.1f}" if found.encoders else ""
        peaks = [f"{peak:.1f}" for peak in (training[0] - spared / GIB, *training)]
        said = [embedding, *(peaks if prompted else ["", "", peaks[-1]])]
        counts = [f"{plan['passes']['in all'][0]:,}" for plan in (plans[0], judged)]
        matrices = plans[0]["memory_gib"]["preconditioner"]
        row(name, str(found.image_shape[-1]), f"{size:.2f}", *said, f"{matrices:.1f}" if matrices else "", *counts)


if __name__ == "__main__":
    main()
