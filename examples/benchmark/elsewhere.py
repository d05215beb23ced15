"""What ComfyUI and kohya's sd-scripts make of the exports: the table of docs/formats.md.

    python examples/benchmark/elsewhere.py --comfyui DIR --sd-scripts DIR --work DIR [MODEL ...]

Both are checkouts. What they import beside this project's libraries lies on PYTHONPATH (einops, torchsde, trampoline,
sentencepiece, comfy-aimdo, comfy-kitchen, toml). torchvision, torchaudio and cv2 are stubs: both import them, and
nothing that is measured calls them.

The models are those of `slim.py`; a LoRA has alpha 16 and rank 4, 8 and 32: read without alpha it would be 25 %, 50 %
and 200 % of itself. What should come out is arithmetic under diffusers' names, in the places that the readers' own
tables of names give. Widths that are written into a reader are set to the model's: blocks of 320 in sd-scripts for
`sd`, of 32 for `sdxl-32`, and for `flux` 256 in sd-scripts, in diffusers, and in this project.
"""

import argparse
import importlib.machinery
import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from tables import row, table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from pipelines import narrow_flux
from slim import BRIEF, IDS, MODELS, NARROW, SIZE, built, changes, patched, share, states, vector

from unforget import families
from unforget.api import export
from unforget.config import ExportConfig
from unforget.families.spec import Setting

ABSENT = ("torchvision", "torchvision.transforms", "torchaudio", "torchaudio.transforms", "cv2")
RANK = 8
"""Of the patch in whole models."""
WHOLE = ("transformer", "single-file")
READ = {  # of UNets under diffusers' names ComfyUI knows released widths alone
    "ComfyUI": {n: WHOLE[1:] if "UNet" in m[1]["_class_name"] else WHOLE for n, m in MODELS.items() if n != "sdxl-32"},
    "sd-scripts": {n: WHOLE if n == "flux" else WHOLE[1:] for n in MODELS if n != "sdxl"},
}
Read = tuple[Any, dict[str, Tensor]]
"""What was loaded, and the answers of its parts."""
WRONG = re.compile(r"missing|unexpected|left ?over|not (loaded|recogni)|fail|mismatch|unsupported|error", re.IGNORECASE)
ELSE = re.compile(r"(text_encoders|vae|\w+_stage_model|conditioner)\..*|.*logit_scale|clip_l.*projection.*")
"""Names in parts that were not to be read, and what CLIP has that nobody uses and no released file holds."""


@contextmanager
def heard() -> Iterator[list[str]]:
    """What the readers log of keys that they do not use or lack."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda r: said.append(r.getMessage()) if WRONG.search(r.getMessage()) else None
    logging.root.addHandler(handler)
    logging.root.setLevel(logging.DEBUG)
    try:
        yield said
    finally:
        logging.root.removeHandler(handler)


def lost(said: list[str]) -> int:
    """Keys of the parts that were read which a reader missed, or did not use."""
    for sentence in said:
        print(sentence[:300], file=sys.stderr)
    names = [n for s in said for n in re.findall(r"'([\w.]+)'", s) or [s]]
    return len([n for n in names if not ELSE.fullmatch(n) and "missing_keys=[]" not in n])


class ComfyUI:
    """What it draws with, and the change that a LoRA makes there: applied, and meant."""

    def __init__(self) -> None:
        from comfy.cli_args import args

        args.cpu = args.use_pytorch_cross_attention = True
        import comfy.sd

        self.comfy = comfy

    def read(self, name: str, kind: str, file: Path, x_t: Tensor, tokens: Tensor, pooled: Tensor) -> Read:
        how, when, clip, vae = {"dtype": torch.float32}, torch.tensor([400.0]), None, None
        if kind == "transformer":
            patcher = self.comfy.sd.load_diffusion_model(str(file), model_options=how)
        else:
            clips = {**how, **{f"clip_{x}_model_config": BRIEF for x in "lg"}}
            patcher, clip, vae, _ = self.comfy.sd.load_checkpoint_guess_config(
                str(file), output_clip=name != "flux", output_vae=name in ("sd", "sd3"), model_options=how,
                te_model_options=clips,
            )  # fmt: skip
        more = {} if name == "sd" else {"y": vector(pooled) if "xl" in name else pooled}
        if name == "flux":
            more, when = {**more, "guidance": torch.tensor([3.5])}, when / 1000
        found = {"network": patcher.model.diffusion_model(x_t, when, tokens, **more)}
        if vae is not None:
            found["VAE"] = vae.first_stage_model.decode(x_t)
        if clip is not None:
            every = {key: [[(int(i), 1.0) for i in IDS[0]]] for key in ("l", "g", "t5xxl")}
            found["CLIP"] = clip.encode_from_tokens({"l": every["l"]} if name == "sd" else every)[:, :77, :2048]
        return patcher, found

    def lora(self, name: str, patcher: Any, file: Path, change: dict[str, Tensor]) -> tuple[Any, Any]:
        comfy, config, state = self.comfy, patcher.model.model_config.unet_config, patcher.model.state_dict()
        on = comfy.sd.load_lora_for_models(patcher, None, comfy.utils.load_torch_file(str(file)), 1.0, 0.0)[0]
        found = {n: comfy.lora.calculate_weight(p, torch.zeros(state[n].shape), n) for n, p in on.patches.items()}
        if names := comfy.utils.unet_to_diffusers(config):
            return found, {f"diffusion_model.{names[n]}": t for n, t in change.items() if n in names}
        return found, comfy.model_detection.convert_diffusers_mmdit(change, "diffusion_model.")


class Scripts:
    """The same of sd-scripts."""

    def read(self, name: str, kind: str, file: Path, x_t: Tensor, tokens: Tensor, pooled: Tensor) -> Read:
        from library import flux_models, flux_utils, model_util, original_unet, sd3_utils, sdxl_original_unet

        when = torch.tensor([400.0])
        if name.startswith("sd3"):
            network = sd3_utils.load_mmdit(load_file(file), None, "cpu")
            return network, {"network": network(x_t, when, pooled, tokens)}
        if name == "flux":
            spec, narrow = flux_models.configs["dev"], {"hidden_size": NARROW, "num_heads": NARROW // 128}
            flux_models.configs["dev"] = replace(spec, params=replace(spec.params, **narrow))
            _, network = flux_utils.load_flow_model(str(file), None, "cpu")
            answer = network(
                flux_utils.pack_latents(x_t), flux_utils.prepare_img_ids(1, 4, 4), tokens,
                torch.zeros(1, tokens.shape[1], 3), when / 1000, pooled, guidance=torch.tensor([3.5]),
            )  # fmt: skip
            return network, {"network": flux_utils.unpack_latents(answer, 4, 4)}
        if name == "sdxl-32":  # its loader of whole files wants CLIP-G in full depth
            sdxl_original_unet.MODEL_CHANNELS, sdxl_original_unet.TIME_EMBED_DIM = 32, 128
            network, prefix = sdxl_original_unet.SdxlUNet2DConditionModel(), "model.diffusion_model."
            tensors = {n.removeprefix(prefix): t for n, t in load_file(file).items() if n.startswith(prefix)}
            logging.info("%s", network.load_state_dict(tensors))
            return network, {"network": network(x_t, when, tokens, vector(pooled))}
        # Its loader of whole files wants transformers 4.54 for the text encoder; this is what it calls before.
        original_unet.BLOCK_OUT_CHANNELS, model_util.UNET_PARAMS_CHANNEL_MULT = (320,) * 4, [1] * 4
        _, tensors = model_util.load_checkpoint_with_text_encoder_conversion(str(file))
        config, other = model_util.create_unet_diffusers_config(False), model_util.create_vae_diffusers_config()
        network, vae = original_unet.UNet2DConditionModel(**config), diffusers.AutoencoderKL(**other)
        logging.info("%s", network.load_state_dict(model_util.convert_ldm_unet_checkpoint(False, tensors, config)))
        logging.info("%s", vae.load_state_dict(model_util.convert_ldm_vae_checkpoint(tensors, other)))
        return network, {"network": network(x_t, when, tokens).sample, "VAE": vae.decode(x_t).sample}

    def lora(self, name: str, network: Any, file: Path, change: dict[str, Tensor]) -> tuple[Any, Any]:
        from library import flux_utils, sdxl_model_util
        from networks import lora, lora_flux

        before = {n: t.clone() for n, t in network.state_dict().items()}
        made, weights = (lora_flux if name == "flux" else lora).create_network_from_weights(
            1.0, str(file), None, [], network, for_inference=True
        )
        for layer in sorted({n.split(".")[0] for n in weights} - {layer.lora_name for layer in made.unet_loras}):
            logging.warning("not loaded: %s", layer)
        made.merge_to([], network, weights, torch.float32, "cpu")
        found = {n: t - before[n] for n, t in network.state_dict().items() if not torch.equal(t, before[n])}
        network.load_state_dict(before)
        if name == "flux":
            return found, flux_utils.convert_diffusers_sd_to_bfl(change, 1, 1)
        return found, sdxl_model_util.convert_diffusers_unet_state_dict_to_sdxl(change) if "xl" in name else change


@torch.no_grad()
def tried(name: str, readers: Mapping[str, Any], work: Path, ranks: list[int]) -> Iterator[list[Any]]:
    """A row for each reader and file: the share of the change, the largest difference, and how many keys are lost."""
    home, config = built(name, work / name), MODELS[name][1]
    family = families.load(str(home), families.Options(resolution=SIZE, t5=False))
    patches = {rank: patched(home, family, rank, work / f"{name}-{rank}.patch") for rank in {RANK, *ranks}}
    state, forms, g = family.network.state_dict(), family.spec.formats, torch.Generator().manual_seed(1)
    given = tuple(torch.randn(1, *shape, generator=g) for shape in (
        (4 if "unet" in family.spec.network else 16, 8, 8),
        (77, config.get("joint_attention_dim") or config["cross_attention_dim"]),
        (config.get("pooled_projection_dim", 1280),),
    ))  # fmt: skip
    stock = type(family.network).from_config(family.network.config).eval()
    stock.load_state_dict({n: state[n] + t for n, t in changes(patches[RANK], state).items()})
    extra, pipe = given[1 : 2 if name == "sd" else 3], family.pipeline
    texts = [t for n in family.spec.text_encoders if (t := getattr(pipe, n, None)) is not None]
    meant = {
        "network": family.spec.call(stock, given[0], torch.tensor([400.0]), extra, Setting((SIZE, SIZE), 3.5)),
        "VAE": pipe.vae.decode(given[0]).sample,
        "CLIP": states(texts[:1] if name == "flux" else texts),
    }
    files: dict[tuple[str, int], Path] = {}

    def exported(form: str, rank: int = RANK) -> Path:
        if (form, rank) not in files:
            one = form in ("transformer", "single-file")
            out = work / f"{name}-{form}-{rank}{'.safetensors' if one else ''}"
            export(ExportConfig(
                model=str(home), patch=patches[rank], output=out, format=form, card=False, force=True, resolution=SIZE
            ))  # fmt: skip
            files[form, rank] = out if one else out / "pytorch_lora_weights.safetensors"
        return files[form, rank]

    for who, reader in readers.items():
        opened = None
        for form in READ[who].get(name, ()):
            file = exported(form)
            with heard() as said:
                try:
                    opened, found = reader.read(name, form, file, *given)
                except Exception as error:
                    yield [name, who, form, "", "refused", " ".join(repr(error).split())[:100]]
                    continue
            for part, answer in found.items():
                apart = float((answer - meant[part]).abs().max() / meant[part].abs().max())
                yield [name, who, f"{form}, {part}", "", f"{apart:.0e}", lost(said)]
        loras = {"lora", "kohya"} & {*forms} - ({"lora"} if who == "sd-scripts" else set())
        for form, rank in [(f, r) for f in sorted(loras) if opened is not None for r in ranks]:
            file, change = exported(form, rank), changes(patches[rank], state)
            with heard() as said:
                part, apart = share(*reader.lora(name, opened, file, change))
            yield [name, who, f"{form}, rank {rank}", f"{part:.2%}", f"{apart:.0e}", lost(said)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path)
    parser.add_argument("--sd-scripts", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="Folder for models and exports; models are kept.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 32])
    parser.add_argument("models", nargs="*", default=[*MODELS], metavar="MODEL")
    args = parser.parse_args()
    narrow_flux(pytest.MonkeyPatch(), NARROW)
    sys.path[1:1] = [str(folder) for folder in (args.comfyui, args.sd_scripts) if folder]
    sys.modules.update({n: MagicMock(__spec__=importlib.machinery.ModuleSpec(n, None)) for n in ABSENT})
    ready = ({"ComfyUI": ComfyUI()} if args.comfyui else {}) | ({"sd-scripts": Scripts()} if args.sd_scripts else {})
    if not args.json:
        table("model", "reader", "file", "applied", "largest difference", "keys lost")
    for name in args.models:
        for cells in tried(name, ready, args.work, args.ranks):
            print(json.dumps(cells), flush=True) if args.json else row(*cells)


if __name__ == "__main__":
    main()
