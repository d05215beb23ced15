"""The configuration of `unforget export`."""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import field_validator, model_validator

from unforget.config.base import DANGER, NO_DELTA, PatchedConfig, option

HUB = "The hub"


class ExportConfig(PatchedConfig):
    """What `unforget export` is asked: a field is the option of that name."""

    COMMAND: ClassVar[str] = "export"

    patch: tuple[Path, ...] = option("Patch to put on the base; repeats, in order.", reads="patch", min_length=1)
    output: Path = option(
        "Folder to write; a .safetensors file for transformer and single-file.", names=("-o",), writes="either"
    )
    format: Literal["diffusers", "lora", "peft", "kohya", "transformer", "single-file"] = option(
        "diffusers: a folder for `from_pretrained`. lora: for `load_lora_weights`. peft: for `PeftModel`. "
        "kohya: for AUTOMATIC1111 and ComfyUI. transformer: the network in one file with diffusers' names. "
        "single-file: one file in the original layout.",
        "diffusers",
    )
    dtype: Literal["float32", "bfloat16", "float16", "fp32", "bf16", "fp16"] | None = option(
        "Precision of the network's weights.", None, "that of the base's file"
    )
    max_shard_size: str = option(
        "Largest file with weights, for the format diffusers.", "10GB", pattern=r"^[1-9]\d{0,8}[KMGT]B$"
    )
    report: Path | None = option(
        "Report of `unforget verify` to record.", None, "verify.json in the patch's .run folder", reads="file"
    )
    card: bool = option("Write a model card into folders.", True)
    card_images: Path | None = option("Folder of images for the model card.", None, "none", reads="folder")
    push_to_hub: str | None = option(
        "Repository owner/name to upload to; the token is $HF_TOKEN or that of `hf auth login`.",
        None, "no upload", names=("--hub-model-id",), panel=HUB, pattern=r"^[\w.-]+/[\w.-]+$",
    )  # fmt: skip
    private: bool = option("Make a new repository private.", True, panel=HUB)
    force_rounding: bool = option("Write the export although rounding loses the change.", False, panel=DANGER)

    @field_validator("format", mode="before")
    @classmethod
    def _no_delta(cls, value: Any) -> Any:
        if value == "delta":
            raise ValueError(NO_DELTA)
        return value

    @field_validator("dtype", mode="before")
    @classmethod
    def _long(cls, value: Any) -> Any:
        return {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(str(value), value)

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.format in ("transformer", "single-file") and self.output.suffix != ".safetensors":
            raise ValueError(f"output is a file that ends in .safetensors, found '{self.output}'")
        return self
