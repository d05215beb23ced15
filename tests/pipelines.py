"""Tiny stock pipelines with random weights, one for each row of families that takes prompts."""

import types

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.loaders import lora_conversion_utils, single_file_utils
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

CAPTIONS = ("a red square", "a blue circle", "the green star")
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


def clip(width: int = 8) -> tuple[CLIPTokenizer, CLIPTextConfig]:
    """A vocabulary of its own, and a text encoder."""
    words = CLIPTokenizer().train_new_from_iterator(CAPTIONS, 560)
    words.model_max_length = 8
    return words, CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=16, projection_dim=8, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=8, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip


def words(**more) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words that is not CLIP's."""
    known = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *sorted({*" ".join(CAPTIONS).split()})))}
    whole = Tokenizer(WordLevel(known, unk_token="<unk>"))
    whole.pre_tokenizer = Whitespace()
    tokens = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", **more}
    return PreTrainedTokenizerFast(tokenizer_object=whole, **tokens)


def t5(width: int) -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    """A text encoder that reads long prompts, and its tokenizer, by which an empty prompt has a token, too."""
    tokens = words()
    end = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", tokens.eos_token_id)])
    tokens.backend_tokenizer.post_processor = end
    config = T5Config(vocab_size=len(tokens), d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval(), tokens


def qwen3(layers: int) -> tuple[PreTrainedTokenizerFast, Qwen3Config]:
    """A tokenizer with a chat template, and a text encoder of width 16."""
    tokens = words(chat_template="{% for m in messages %}the {{ m['content'] }} {% endfor %}red")
    return tokens, Qwen3Config(
        vocab_size=len(tokens), hidden_size=16, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
    )  # fmt: skip


def vae(latent_channels: int, **more) -> AutoencoderKL:
    """16x16 pixels to 8x8 latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4), layers_per_block=1, latent_channels=latent_channels, norm_num_groups=2,
        sample_size=16, **more,
    )  # fmt: skip


def unet(**more) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **more,
    )  # fmt: skip


def tiny_sd(scheduler=None) -> StableDiffusionPipeline:
    """Stable Diffusion 1.x with its safety checker; 2.x with another scheduler."""
    torch.manual_seed(0)
    words, text = clip()
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    look = CLIPConfig(text_config=small, vision_config={**small, "image_size": 8, "patch_size": 4}, projection_dim=8)
    return StableDiffusionPipeline(
        vae(4), CLIPTextModel(text), words, unet(cross_attention_dim=8),
        scheduler or PNDMScheduler(**BETAS, skip_prk_steps=True), StableDiffusionSafetyChecker(look),
        CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=8),
    )  # fmt: skip


def tiny_sd2() -> StableDiffusionPipeline:
    """Velocity, and noise alone at the last timestep."""
    how = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    return tiny_sd(DDIMScheduler(**BETAS, **how))


def tiny_sdxl(*, zeros: bool = True) -> StableDiffusionXLPipeline:
    """Both text encoders, six numbers of the size, and an autoencoder that wants float32.

    Stock tells the text encoders of a single file apart by their width.
    """
    torch.manual_seed(0)
    (words, text), (_, wide) = clip(), clip(16)
    network = unet(
        cross_attention_dim=24, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 + 6 * 8, use_linear_projection=True,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae(4, scaling_factor=0.13025, force_upcast=True), CLIPTextModel(text), CLIPTextModelWithProjection(wide),
        words, words, network, EulerDiscreteScheduler(**BETAS), force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )  # fmt: skip


def tiny_sd3(seed: int = 0) -> StableDiffusion3Pipeline:
    """Without T5."""
    torch.manual_seed(seed)
    words, text = clip()
    images = vae(16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=1.5)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=16, pooled_projection_dim=16,
        pos_embed_max_size=8,
    )  # fmt: skip
    for p in transformer.norm_out.parameters():  # a fresh transformer answers next to nothing
        torch.nn.init.normal_(p, std=0.5)
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=images,
        text_encoder=CLIPTextModelWithProjection(text), tokenizer=words,
        text_encoder_2=CLIPTextModelWithProjection(text), tokenizer_2=words, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def tiny_flux(*, dev: bool = True) -> FluxPipeline:
    """dev, or schnell: neither guidance nor a shifted schedule."""
    torch.manual_seed(0)
    words, text = clip()
    reader, tokens = t5(24)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=8, guidance_embeds=dev, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0 if dev else 1.0, use_dynamic_shifting=dev),
        vae(4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=0.36),
        CLIPTextModel(text), words, reader, tokens, transformer,
    )  # fmt: skip


def narrow_flux(monkeypatch, width: int = 16) -> None:
    """Let stock readers, which have the released width written into them, and ours divide the layers of `tiny_flux`."""
    numbers = {3072: width, 4 * 3072: 4 * width}

    def narrow(value):
        if isinstance(value, types.CodeType):
            return value.replace(co_consts=narrow(value.co_consts))
        return tuple(map(narrow, value)) if isinstance(value, tuple) else numbers.get(value, value)

    for reader in (
        single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
        lora_conversion_utils._convert_kohya_flux_lora_to_diffusers,
    ):
        assert narrow(reader.__code__) != reader.__code__
        monkeypatch.setattr(reader, "__code__", narrow(reader.__code__))
    monkeypatch.setattr("unforget.families.layouts.flux.WIDTH", width)


def tiny_z_image() -> ZImagePipeline:
    """Prompts in a chat template, of as many tokens as they have."""
    torch.manual_seed(0)
    tokens, reader = qwen3(2)
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 2, 2], axes_lens=[1024, 64, 64],
    )  # fmt: skip
    for p in transformer.parameters():  # some are zeros, some are empty memory
        torch.nn.init.normal_(p, std=0.2)
    images = vae(4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=0.36)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return ZImagePipeline(scheduler, images, Qwen3Model(reader).eval(), tokens, transformer)


def tiny_flux2() -> Flux2KleinPipeline:
    """Layers 9, 18 and 27 of the text encoder are read; the autoencoder has counted means and variances."""
    torch.manual_seed(0)
    tokens, reader = qwen3(28)
    images = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16,
        block_out_channels=(4, 4), layers_per_block=1, latent_channels=4, norm_num_groups=2,
    )  # fmt: skip
    images.bn.running_mean.normal_(std=0.1)
    images.bn.running_var.uniform_(0.5, 2)
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=48, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False, timestep_guidance_channels=16,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return Flux2KleinPipeline(scheduler, images, Qwen3ForCausalLM(reader).eval(), tokens, transformer)


def tiny_sana() -> SanaPipeline:
    """Prompts behind an instruction, padded and masked; a flow by a solver. Stock draws multiples of 32 pixels."""
    torch.manual_seed(0)
    tokens = words(bos_token="<unk>")
    reader = Gemma2Config(
        vocab_size=len(tokens), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=1024,
    )  # fmt: skip
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, sample_size=16,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
    )  # fmt: skip
    images = AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(4, 8), decoder_block_out_channels=(4, 8), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        scaling_factor=0.41407,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return SanaPipeline(tokens, Gemma2Model(reader).eval(), images, transformer, scheduler)


def tiny_pixart() -> PixArtSigmaPipeline:
    """Learnt variance, and a mask over the 300 tokens of a prompt."""
    torch.manual_seed(0)
    reader, tokens = t5(24)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=16, caption_channels=24, sample_size=8, norm_num_groups=2,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02)
    return PixArtSigmaPipeline(tokens, reader, vae(4, scaling_factor=0.13025), transformer, scheduler)


def tiny_dit() -> DiTPipeline:
    """A thousand classes and none, learnt variance."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, out_channels=8, num_layers=2, sample_size=8, norm_num_groups=2,
    )  # fmt: skip
    for p in (*transformer.proj_out_2.parameters(), *transformer.transformer_blocks[0].norm1.parameters()):
        torch.nn.init.normal_(p, std=0.2)  # a fresh transformer answers next to nothing
    scheduler = DDIMScheduler(clip_sample=False)
    return DiTPipeline(transformer, vae(4), scheduler, id2label={7: "cock, rooster", 207: "golden retriever"})


def tiny_editor(parts: StableDiffusion3Pipeline) -> StableDiffusionInstructPix2PixPipeline:
    """InstructPix2Pix that reads words as another model does."""
    text = CLIPTextModel(CLIPTextConfig.from_dict({**parts.text_encoder.config.to_dict(), "architectures": None}))
    images = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4,
    )  # fmt: skip
    network = UNet2DConditionModel(
        block_out_channels=(4, 8), layers_per_block=1, in_channels=8, cross_attention_dim=8, norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
    )  # fmt: skip
    return StableDiffusionInstructPix2PixPipeline(
        images, text, parts.tokenizer, network, EulerDiscreteScheduler(), None, None, requires_safety_checker=False
    )
