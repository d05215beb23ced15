"""One run: prepare, train, and the difference as a patch."""

import json
import signal
import threading
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn, Self

from unforget.core import distributed
from unforget.core.recipe import Recipe
from unforget.core.types import Family, Progress
from unforget.errors import CannotRun, Interrupted, NothingChanged, Terminated
from unforget.files import images
from unforget.files.patch import Patch, Provenance
from unforget.unlearning.compute import Compute
from unforget.unlearning.prepare import Prepared, RunInputs, prepare
from unforget.unlearning.run_directory import RunDirectory
from unforget.unlearning.trainer import Trainer

STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@dataclass(frozen=True)
class Trained:
    """What a run made; `stopped` is `margin` or `budget`, `margin` None unless the recipe stops by it."""

    base: Family
    prepared: Prepared
    patch: Patch
    steps: int
    stopped: str
    margin: float | None


def run(
    patched: Family, inputs: RunInputs, recipe: Recipe, compute: Compute, directory: RunDirectory, record: Provenance,
    progress: Progress,
) -> Trained:  # fmt: skip
    """Train the weights of `patched`, the base until then, in place, or go on where the directory's run was.

    SIGINT, SIGTERM and SIGHUP stop it after the update in progress (`Interrupted`, `Terminated`). If a loss is NaN it
    leaves the last good weights in the directory (`CannotRun`); if no weight moved it removes that (`NothingChanged`).
    """
    base = patched.frozen_reference(recipe.train)
    prepared = directory.prepared(base, lambda: prepare(base, inputs, progress))
    patched.unload_text_encoders()
    if compute.gradient_checkpointing:
        patched.network.enable_gradient_checkpointing()  # type: ignore[operator]
    trainer = Trainer(patched, base, prepared, recipe, seed=inputs.seed, compute=compute, resume=directory.saved())
    own = prepared.instances[: len(inputs.targets)] if inputs.replaces else ()
    surrogates = [images.image_id(i.surrogate, inputs.salt) for i in own]

    def patch() -> Patch:
        made = record.model_copy(update={"surrogates": surrogates, "steps": trainer.done})
        return Patch.between(base.network, patched.network, made)

    try:
        _train(trainer, directory, progress)
    except CannotRun:
        if trainer.done:
            patch().save(directory.folder / "last-good.patch")
        raise
    made = patch()
    if not made.tensors:
        directory.remove()
        raise NothingChanged("the run ended with the weights it began with", "Raise --learning-rate.")
    stopped = "margin" if trainer.lr_schedule.reached else "budget"
    return Trained(base, prepared, made, trainer.done, stopped, trainer.margin)


def _train(trainer: Trainer, directory: RunDirectory, progress: Progress) -> None:
    most = trainer.recipe.max_train_steps
    progress.stage("unlearn", most)
    progress.advance(trainer.done)
    with directory.log(trainer.done).open("a") as log, Patience() as patience:
        for row in trainer:
            if distributed.is_main():
                log.write(json.dumps(row) + "\n")
                log.flush()
            progress.advance(1, **row)
            stopped = distributed.any_process(patience.asked is not None)
            if stopped or directory.due(trainer.done):
                directory.save(trainer.state())
            if stopped:
                patience.leave(f"stopped after step {trainer.done} of {most}", "Go on with --resume.")


class Patience:
    """Lets the update in progress end when SIGINT, SIGTERM or SIGHUP come; a second one does not wait.

    Main thread only; a signal that is ignored, as nohup wants it, stays so.
    """

    asked: int | None = None

    def __enter__(self) -> Self:
        main = threading.current_thread() is threading.main_thread()
        heard = [s for s in STOPPING if main and signal.getsignal(s) is not signal.SIG_IGN]
        self._before = {s: signal.signal(s, self._ask) for s in heard}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            self.leave("stopped in the middle of a step", "Go on with --resume, from the last checkpoint.")
        self.asked = number

    def leave(self, message: str, hint: str) -> NoReturn:
        """End as the signal wants it."""
        raise (Interrupted if self.asked == signal.SIGINT else Terminated)(message, hint)
