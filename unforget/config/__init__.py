"""One flat, frozen configuration a command: a field is the option, the TOML key and the Python keyword.

Nothing here imports torch, so that a wrong option is refused at once and `--help` is quick.
"""

from unforget.config.base import Config, DrawConfig, ImageConfig, ModelConfig, run_folder
from unforget.config.edit import EditConfig
from unforget.config.export import ExportConfig
from unforget.config.files import build, check_paths, outputs, policy_file, read_policy, resolve
from unforget.config.unlearn import RecipeOptions, UnlearnConfig
from unforget.config.verify import Allow, Policy, VerifyConfig

__all__ = [
    "Allow", "Config", "DrawConfig", "EditConfig", "ExportConfig", "ImageConfig", "ModelConfig", "Policy",
    "RecipeOptions", "UnlearnConfig", "VerifyConfig", "build", "check_paths", "outputs", "policy_file", "read_policy",
    "resolve", "run_folder",
]  # fmt: skip
