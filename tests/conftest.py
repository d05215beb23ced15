import json
import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from typer.testing import CliRunner

from unforget import data
from unforget.cli import app
from unforget.families.ddpm import DDPM

DATA = Path(__file__).parent / "data"
PLANTED = Path(__file__).parents[1] / "examples" / "faces" / "planted"


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path_factory):
    """No test sees the user's cache or the network."""
    monkeypatch.setenv("UNFORGET_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


def tiny_pipeline(seed: int = 0, size: int = 16, **scheduler) -> DDPMPipeline:
    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=size,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
    )
    return DDPMPipeline(unet, DDPMScheduler(**scheduler))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tiny_folder) -> DDPM:
    return DDPM(DDPMPipeline.from_pretrained(tiny_folder), "tiny")


@pytest.fixture
def picture(tmp_path) -> Path:
    """A 16x16 picture of the tiny model's size."""
    path = tmp_path / "picture.png"
    data.write_image(torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(5)) * 2 - 1, path)
    return path


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """Run the command in an empty folder: cli("verify", "--model", ...) gives the result."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture
def flat_folder(tiny_folder, tmp_path) -> Path:
    """The layout of old DDPM repositories: everything in one folder."""
    flat = tmp_path / "flat"
    flat.mkdir()
    shutil.copy(tiny_folder / "model_index.json", flat)
    for file in [*(tiny_folder / "unet").iterdir(), *(tiny_folder / "scheduler").iterdir()]:
        shutil.copy(file, flat)
    return flat


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
