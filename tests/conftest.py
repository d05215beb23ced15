import contextlib
import json
import os
import re
import shutil
import signal
import socket
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # workers share the cores; read once, when torch is imported

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from pipelines import CAPTIONS, tiny_editor, tiny_sd3
from typer.testing import CliRunner

from unforget import families
from unforget.api import verifying
from unforget.cli import app
from unforget.config import UnlearnConfig, VerifyConfig
from unforget.families.ddpm import SPEC as DDPM
from unforget.families.model import DiffusionModel
from unforget.files import images
from unforget.unlearning import trainer

for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:  # as of a job in the background, and then of what it starts
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)
DATA = Path(__file__).parent / "data"
PLANTED = Path(__file__).parents[1] / "examples" / "faces" / "planted"


def pytest_collection_modifyitems(items):
    """With --dist loadgroup a file has one process, for its tests share what takes a minute; the longest has two."""
    for k, item in enumerate(items):
        half = k % 2 if item.path.stem == "test_cheats" else ""
        item.add_marker(pytest.mark.xdist_group(f"{item.path.stem}{half}"))


@pytest.fixture(scope="session", autouse=True)
def _no_secret_of_the_users(tmp_path_factory):
    """Entries of a test's cache are signed by the tests' own secret."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.getbasetemp() / "state"))
        yield


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path_factory):
    """No test sees the user's cache or the network."""
    monkeypatch.setenv("UNFORGET_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(autouse=True)
def _no_luck(monkeypatch):
    """Verdicts in this process are the same every time."""
    monkeypatch.setattr(verifying, "_nonce", lambda config: config.nonce or "")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch, request):
    """Nothing but the tests of the hub opens a connection, and those only on this machine."""
    if "hub" in request.keywords:
        return

    def blocked(self, address):
        if isinstance(address, tuple):
            raise AssertionError(f"a test went to the network: {address}")
        return connect(self, address)

    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", blocked)
    monkeypatch.setattr(socket.socket, "connect_ex", blocked)


def tiny_pipeline(seed: int = 0, size: int = 16, unet: dict | None = None, **scheduler) -> DDPMPipeline:
    torch.manual_seed(seed)
    network = {
        "sample_size": size, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False,
    }  # fmt: skip
    return DDPMPipeline(UNet2DModel(**{**network, **(unet or {})}), DDPMScheduler(**scheduler))


def by_its_card(folder: Path, base: str = "") -> object:
    """The pipeline that the lines on an export's card open, where they stand; `base` is what they say to fill in."""
    code = re.search(r"```python\n(.*?)\n```", (folder / "README.md").read_text(), re.S)[1]
    names = {}
    with contextlib.chdir(folder):
        exec(code.replace('"path/to/the/base"', base), names)
    return names["pipe"]


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-sd3"
    tiny_sd3().save_pretrained(folder)
    (folder / "unforget.json").write_text(json.dumps({"guidance": 2.0, "retain_prompts": list(CAPTIONS)}))
    return folder


@pytest.fixture
def sd3(sd3_folder):
    return families.load(str(sd3_folder))


@pytest.fixture
def editor_folder(sd3, tmp_path):
    """A tiny InstructPix2Pix with random weights, and its card."""
    folder = tmp_path / "editor"
    tiny_editor(sd3.pipeline).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: cc0-1.0\n---\n")
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tiny_folder) -> DiffusionModel:
    pipeline = DDPMPipeline.from_pretrained(tiny_folder)
    return DiffusionModel(DDPM, pipeline, "tiny", families.Options(), families.Hints())


@pytest.fixture
def picture(tmp_path) -> Path:
    """A 16x16 picture of the tiny model's size."""
    path = tmp_path / "picture.png"
    images.write_image(torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(5)) * 2 - 1, path)
    return path


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder with target.png and surrogate.png, both noise."""
    g = torch.Generator().manual_seed(3)
    for name in ("target", "surrogate"):
        images.write_image(torch.rand(3, 16, 16, generator=g) * 2 - 1, tmp_path / f"{name}.png")
    return tmp_path


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


@pytest.fixture(scope="session")
def work(tmp_path_factory) -> Path:
    """A folder with a patch of planted identity 0 that the command made, and what it said."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNFORGET_CACHE", str(folder / "cache"))
        result = CliRunner().invoke(app, [
            "unlearn", "--model", "faces", "--target", str(PLANTED / "0.png"), "--surrogate",
            str(DATA / "surrogate.png"), "-o", str(folder / "face.patch"), "--retain-count", "96", "--max-train-steps",
            "120", "--stop-margin", "1", "--json",
        ])  # fmt: skip
    assert result.exit_code == 0, result.output
    (folder / "result.json").write_text(result.stdout)
    return folder


@pytest.fixture
def few() -> dict[str, object]:
    """What programs build, by its names: with few updates and draws, after which nothing is forgotten."""
    steps = {"sampler_steps": 2}
    learn = partial(UnlearnConfig, max_train_steps=2, retain_count=8, num_validation_images=1, **steps)
    judge = partial(VerifyConfig, max_rate=0.4, paired=16, controls=8, draws=2, **steps)
    return {"UnlearnConfig": learn, "VerifyConfig": judge}


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


STEPS = 30


@pytest.fixture
def config(tiny_folder, tmp_path):
    """A run of thirty updates on a tiny model, with looks at the margin and a learning rate that depends on them."""
    for k, name in enumerate(("target", "surrogate")):
        picture = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(k)) * 2 - 1
        images.write_image(picture, tmp_path / f"{name}.png")

    def make(name="a", **changes):
        options = {
            "model": str(tiny_folder), "target": (tmp_path / "target.png",), "surrogate": (tmp_path / "surrogate.png",),
            "output": tmp_path / f"{name}.patch", "retain_count": 8, "sampler_steps": 2, "num_validation_images": 1,
            "checkpointing_steps": 1, "max_train_steps": STEPS, "cooldown_steps": 8, "train_batch_size": 2,
            "retain_batch_size": 4, "learning_rate": 1e-3, "stop_margin": -1.0,
        }  # fmt: skip
        return UnlearnConfig(**{**options, **changes})

    return make


def stop_at(monkeypatch, step, number=signal.SIGINT):
    """Send a signal while an update is under way."""
    row = trainer._row

    def signalling(update, *args):
        if update.number == step:
            os.kill(os.getpid(), number)
        return row(update, *args)

    monkeypatch.setattr(trainer, "_row", signalling)
