"""The folder of a run: who it is, what it prepared, and where it was, so that it can go on from there.

`run.json` is written before any work and names what the run was asked for; `prepared.safetensors` holds what training
starts from; `checkpoint.safetensors` all that changes from update to update. Each is written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unforget.core import distributed
from unforget.core.objectives import Context
from unforget.core.types import Family, Instance, Pool
from unforget.errors import CannotRun, UsageError
from unforget.files.storage import BadFile, atomic_output, digest, open_tensors, read_json, write_json, write_tensors
from unforget.unlearning.prepare import answers
from unforget.unlearning.trainer import State

HEADER = "unforget.run"
"""Key of the header of a file of a run."""
OVERHEAD = 0.05
"""Largest share of a run's time that goes into saving it, unless the user says how often."""


def must_exist(folder: Path) -> None:
    """Refuse to resume what is not there: never a fresh start.

    Raises:
        UsageError: If the folder holds no run.
    """
    if not (folder / "run.json").is_file():
        raise UsageError(f"there is no run to resume in '{folder}'", "Start it without --resume.")


def must_not_go_on(folder: Path, force: bool) -> None:
    """Refuse to start where a run can be resumed.

    Raises:
        UsageError: If a run was stopped there, unless by force.
    """
    if not force and (folder / "run.json").is_file() and not (folder / "sheet.png").is_file():
        raise UsageError(
            f"'{folder}' holds a run that did not end", "Go on with --resume, or start again with --force."
        )


@dataclass(frozen=True)
class Prepared:
    """What training starts from.

    Attributes:
        instances: Targets and surrogates, as pictures.
        context: What objectives may consult.
        near: Pictures to keep that are near a target, as the network works on them.
    """

    instances: tuple[Instance, ...]
    context: Context
    near: Pool


class Run:
    """The folder of one run, and what may be asked of it.

    Args:
        folder: `NAME.run`.
        asked: What the run is to do, as JSON: all that its result depends on.
        how: Machine and pace, which may change when it goes on.
    """

    def __init__(self, folder: Path, asked: Mapping[str, Any], how: Mapping[str, Any]) -> None:
        self.folder, self.asked, self.how = folder, dict(asked), dict(how)
        self.finished: dict[str, Any] | None = None
        self._saved, self._cost = 0.0, 0.0

    @property
    def _manifest(self) -> Path:
        return self.folder / "run.json"

    @property
    def _prepared(self) -> Path:
        return self.folder / "prepared.safetensors"

    @property
    def checkpoint(self) -> Path:
        """Where the state lies."""
        return self.folder / "checkpoint.safetensors"

    def begin(self) -> None:
        """Make the folder, without what an earlier run of that name left."""
        if not distributed.is_main():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        mine = ("target-*.png", "surrogate-*.png", "sheet.png", "metrics.jsonl", "last-good.patch", "verify.json")
        for pattern in (*mine, "run.json", "prepared.safetensors", "checkpoint.safetensors", ".*.partial"):
            for path in self.folder.glob(pattern):
                path.unlink()
        self._write()

    def _write(self) -> None:
        if distributed.is_main():
            write_json({"asked": self.asked, "how": self.how, "finished": self.finished}, self._manifest)

    def take_up(self) -> list[str]:
        """Go on with the run that is there.

        Returns:
            What is done otherwise than before, as sentences: the result may differ in its last bits.

        Raises:
            UsageError: If there is none, or it was asked for something else. Never a fresh start.
        """
        must_exist(self.folder)
        try:
            found = read_json(self._manifest)
            asked, how, self.finished = dict(found["asked"]), dict(found["how"]), found["finished"]
        except (BadFile, OSError, KeyError, TypeError, ValueError):
            raise UsageError(f"'{self._manifest}' is damaged, or of another run", "Start again with --force.") from None
        # What it is asked for now, as a file would hold it.
        wanted = json.loads(json.dumps(self.asked))
        other = [k for k in {**asked, **wanted} if asked.get(k) != wanted.get(k)]
        if other:
            raise UsageError(
                f"the run in '{self.folder}' is another one: it differs in {', '.join(sorted(other))}",
                "Resume it with the options it was started with, or give another --output.",
            )
        now = json.loads(json.dumps(self.how))
        return [f"{k} was {how.get(k)!r} and is {now[k]!r}" for k in now if how.get(k) != now[k]]

    def finish(self, result: Mapping[str, Any]) -> None:
        """Note the result; what was kept to go on is not needed any more."""
        self.finished = dict(result)
        self._write()
        if distributed.is_main():
            self._prepared.unlink(missing_ok=True)
            self.checkpoint.unlink(missing_ok=True)

    @property
    def is_prepared(self) -> bool:
        """Whether the run came so far before it was stopped."""
        return distributed.broadcast(self._prepared.is_file())

    def prepared(self, base: Family, base_digest: str) -> Prepared:
        """What training starts from.

        Raises:
            UsageError: If the file is damaged.
            CannotRun: If the model is not the one that it was prepared with.
        """
        distributed.barrier()
        try:
            said, tensors = self._open(self._prepared)
            if said["base_digest"] != base_digest:
                raise CannotRun(
                    f"the run began with another model ({said['base_digest'][:12]}, now {base_digest[:12]})",
                    "Give the model that it began with.",
                )
            base.prompt_ids(said["prompts"])
            return _unpacked(tensors, said, base)
        except (OSError, KeyError, TypeError, ValueError, IndexError, RecursionError):
            raise UsageError(f"'{self._prepared}' is damaged, or of another run", "Start again with --force.") from None

    def keep(self, prepared: Prepared, base: Family, base_digest: str) -> None:
        """Store what training starts from."""
        tensors, said = _packed(prepared)
        said.update(base_digest=base_digest, prompts=base.prompts)
        self._store(self._prepared, said, tensors)

    def state(self) -> State | None:
        """Where the run was, if it made an update.

        Raises:
            UsageError: If the file is damaged.
        """
        if not distributed.broadcast(self.checkpoint.is_file()):
            return None
        try:
            figures, tensors = self._open(self.checkpoint)
            return State(tensors, figures)
        except (OSError, KeyError, TypeError, ValueError, RecursionError):
            raise UsageError(
                f"'{self.checkpoint}' is damaged, or of another run", "Start again with --force."
            ) from None

    def save(self, state: State) -> None:
        """Store where the run is."""
        began = time.monotonic()
        if distributed.is_main():
            self._store(self.checkpoint, state.figures, state.tensors)
        self._saved, self._cost = time.monotonic(), time.monotonic() - began

    @property
    def _name(self) -> str:
        """Tells the files of this run from those of any other."""
        return hashlib.sha256(json.dumps(self.asked, sort_keys=True).encode()).hexdigest()

    def _store(self, path: Path, said: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        header = {"run": self._name, "digest": digest(tensors), "said": dict(said)}
        with atomic_output(path) as beside:
            write_tensors(tensors, {HEADER: json.dumps(header)}, beside)

    def _open(self, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a file of this run says and holds, if it is whole and not another run's."""
        opened = open_tensors(path)
        tensors, header = opened.load(), json.loads(opened.metadata[HEADER])
        if header["digest"] != digest(tensors) or header["run"] != self._name:
            raise BadFile(f"'{path.name}' is damaged, or of another run")
        return dict(header["said"]), tensors

    def due(self, step: int, every: int | None) -> bool:
        """Whether to save after an update: every so many, or as often as it costs little."""
        if every is not None:
            return step % every == 0
        return time.monotonic() - self._saved >= self._cost / OVERHEAD

    def log(self, done: int) -> None:
        """Cut the log back to the updates that count."""
        path = self.folder / "metrics.jsonl"
        if distributed.is_main():
            lines = path.read_text().splitlines(keepends=True)[:done] if path.is_file() else []
            with atomic_output(path) as beside:
                beside.write_text("".join(lines))


def _packed(prepared: Prepared) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, said = {}, {}
    for name, instances in (("shown", prepared.instances), ("gone", prepared.context.instances)):
        for side in ("target", "surrogate"):
            tensors[f"{name}.{side}"] = torch.stack([getattr(i, side) for i in instances])
        said[name] = [[i.id, list(i.prompt_ids)] for i in instances]
    for name, pool in (("keep", prepared.context.keep), ("near", prepared.near)):
        tensors[f"{name}.x_0"], tensors[f"{name}.prompt_ids"] = pool.x_0, pool.prompt_ids
    tensors["copies"] = prepared.context.copies
    return tensors, said


def _unpacked(tensors: Mapping[str, Tensor], said: Mapping[str, Any], base: Family) -> Prepared:
    def instances(name: str) -> tuple[Instance, ...]:
        rows: Sequence[Any] = said[name]
        sides = zip(tensors[f"{name}.target"], tensors[f"{name}.surrogate"], rows, strict=True)
        return tuple(Instance(t, s, str(id), tuple(prompt_ids)) for t, s, (id, prompt_ids) in sides)

    def pool(name: str) -> Pool:
        return Pool(tensors[f"{name}.x_0"], tensors[f"{name}.prompt_ids"])

    context = Context(base.schedule, answers(base), instances("gone"), pool("keep"), tensors["copies"])
    return Prepared(instances("shown"), context, pool("near"))
