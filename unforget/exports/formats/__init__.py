"""The forms that other programs open, a class each; a new one is a class, and its name here."""

from unforget.exports.formats.base import Format, Job
from unforget.exports.formats.diffusers_folder import DiffusersFolder
from unforget.exports.formats.files import SingleFile, Transformer
from unforget.exports.formats.lora import Kohya, Lora, Peft

CLASSES: tuple[type[Format], ...] = (DiffusersFolder, Lora, Peft, Kohya, Transformer, SingleFile)
FORMATS = {form.kind: form for form in CLASSES}
"""By the name that `--format` takes. Which of them a family has, its row says."""

__all__ = ["FORMATS", "Format", "Job"]
