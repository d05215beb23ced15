"""The configuration of `unforget edit-surrogate`."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from unforget.config.base import DrawConfig, beside, option
from unforget.config.pictures import Picture

INSTRUCT, DRAWN = ("method", "instruct"), ("method", "sdedit", "inpaint", "repaint", "instruct")


def _method(data: dict[str, Any]) -> str:
    """The method that goes with what was given."""
    for name, method in (("donor", "donor"), ("instruction", "instruct"), ("mask", "inpaint"), ("box", "inpaint")):
        if data.get(name) is not None:
            return method
    return "sdedit"


class EditConfig(DrawConfig):
    """What `unforget edit-surrogate` is asked: a field is the option of that name."""

    COMMAND: ClassVar[str] = "edit-surrogate"

    target: Picture = option("Image to replace.", names=("-t",), reads="file")
    output: Path = option(
        "PNG file to write.", beside("target", ".surrogate.png"), "TARGET.surrogate.png", names=("-o",), writes="file"
    )
    mask: Path | None = option(
        "Edit where this image is white.", None, "everywhere, an ellipse for a donor", reads="file"
    )
    box: tuple[int, int, int, int] | None = option("Edit inside x,y,width,height, in pixels.", None, "everywhere")
    instruction: str | None = option("What to change, in words.", None, "none", of=INSTRUCT, min_length=1)
    editor_model: str = option(
        "Hub id or folder of an instruction editor.", "black-forest-labs/FLUX.2-klein-4B", of=INSTRUCT
    )
    donor: Picture | None = option("Image to take the pixels from.", None, "none", of=("method", "donor"), reads="file")
    method: Literal["sdedit", "inpaint", "repaint", "instruct", "donor", "blur", "pixelate"] = option(
        "How to edit.", _method, "donor, instruct or inpaint by what is given, else sdedit"
    )
    strength: tuple[Annotated[float, Field(gt=0, le=1)], ...] = option(
        "Noise to begin from, as a share of the schedule; repeats.", (), "several, by the method", of=DRAWN[:3]
    )
    candidates: int | None = option(
        "Number of candidates, for each strength.", None, "24, 8 or 4, by the method", of=DRAWN, ge=1, le=256
    )
    editor_steps: int | None = option(
        "Sampler steps of the editor.", None, "20, 50 for repaint", of=DRAWN, ge=2, le=1000
    )
    pick: int | None = option("Take this candidate of the contact sheet.", None, "the best", ge=1, le=100_000)

    html: Path | None = option(
        "HTML page to write: all candidates, why some are refused, and the command that takes each.", None, "none",
        writes="file",
    )  # fmt: skip

    @property
    def sheet(self) -> Path:
        """The contact sheet of all candidates."""
        return self.output.parent / f"{self.output.name.removesuffix('.png')}.sheet.png"

    def written_beside(self) -> dict[Path, str]:
        """The contact sheet."""
        return {self.sheet: "file"}
