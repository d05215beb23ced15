"""Unconditional models on latents: diffusers' `LDMPipeline`, a `UNet2DModel` behind a VQ or KL autoencoder."""

from dataclasses import replace

from unforget.families import ddpm, sd

SPEC = replace(
    ddpm.SPEC,
    name="ldm",
    title="Latent diffusion without prompts",
    pipeline_class="LDMPipeline",
    also=(),
    autoencoder="vqvae",
    autoencoders=("VQModel", "AutoencoderKL"),
    architecture=lambda config: "ldm-unet",
    aliases={"ldm-celebahq": "CompVis/ldm-celebahq-256"},
    unfit=lambda config: "is class-conditional" if config.get("num_class_embeds") else sd.unfit(config),
    sampler_options={"clip_sample": False},  # latents have no bounds
)
