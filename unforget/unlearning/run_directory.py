"""The folder of a run: who it is, what it prepared, and where it was, so that it can go on from there.

`run.json` is written before any work and names what the run is to do; `prepared.safetensors` holds what training
starts from; `checkpoint.safetensors` all that changes from update to update. Each is written whole or not at all.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unforget.core import distributed
from unforget.core.types import Family, Instance, Pool
from unforget.errors import Interrupted, Terminated, UnforgetError, UsageError
from unforget.files.storage import (
    BadFile,
    atomic_output,
    checksummed,
    digest,
    open_tensors,
    read_json,
    undamaged,
    write_bytes,
    write_json,
    write_tensors,
)
from unforget.unlearning.prepare import Prepared
from unforget.unlearning.trainer import Saved

HEADER = "unforget.run"  # key of the header of a file of a run
MAX_LINE = 2**20  # bytes of a line of the log
OVERHEAD = 0.05  # largest share of a run's time that goes into saving it, unless the user says how often
FILES = (
    "target-*.png", "surrogate-*.png", "sheet.png", "metrics.jsonl", "last-good.patch", "verify.json", "run.json",
    "prepared.safetensors", "checkpoint.safetensors", ".*.partial",
)  # fmt: skip
"""What a run leaves in its folder; the user's own files there stay."""


def check_start(folder: Path, *, resume: bool, force: bool) -> None:
    """Refuse (`UsageError`) to resume what is not there, and, unless by force, to start where a run can go on."""
    begun = (folder / "run.json").is_file()
    if resume and not begun:
        raise UsageError(f"there is no run to resume in '{folder}'", "Start it without --resume.")
    if begun and not resume and not force and not (folder / "sheet.png").is_file():
        raise UsageError(
            f"'{folder}' holds a run that did not end", "Go on with --resume, or start again with --force."
        )


class RunDirectory:
    """The folder of one run, `NAME.run`.

    Its result depends on all `inputs`; the `environment` may change when it goes on, at the price of its last bits.
    Checkpoints are `save_every` updates apart, or as often as costs little.
    """

    def __init__(
        self, folder: Path, inputs: Mapping[str, Any], environment: Mapping[str, Any], save_every: int | None = None
    ) -> None:
        # As a file would hold them.
        self.inputs, self.environment = json.loads(json.dumps([inputs, environment]))
        self.folder, self.save_every = folder, save_every
        self._id = hashlib.sha256(json.dumps(self.inputs, sort_keys=True).encode()).hexdigest()
        self.finished: dict[str, Any] | None = None
        self._manifest, self._prepared = folder / "run.json", folder / "prepared.safetensors"
        self._checkpoint, self._log = folder / "checkpoint.safetensors", folder / "metrics.jsonl"
        self._saved, self._cost = 0.0, 0.0

    def begin(self) -> None:
        """Make the folder, without what an earlier run of that name left."""
        if distributed.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.folder.chmod(0o700)  # it holds targets
            self._empty()
            self._write()

    def _empty(self) -> None:
        for path in (p for pattern in FILES for p in self.folder.glob(pattern)):
            path.unlink()

    def remove(self) -> None:
        """Remove all that a run left; the user's own files stay, and the folder with them."""
        if distributed.is_main() and self.folder.is_dir():
            self._empty()
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """`begin`; and whoever is refused before the first update can start a corrected command."""
        self.begin()
        try:
            yield
        except UnforgetError as error:
            if not isinstance(error, (Interrupted, Terminated)) and not self._lines(None):
                self.remove()
            raise

    def _write(self) -> None:
        parts = {"asked": self.inputs, "environment": self.environment, "finished": self.finished}
        write_json(checksummed(parts), self._manifest)

    def take_up(self) -> list[str]:
        """Go on with the run that is there, with the same inputs; says what is done otherwise than before."""
        with _whole(self._manifest):
            found = undamaged(read_json(self._manifest))
            inputs, before, ended = dict(found["asked"]), dict(found["environment"]), found["finished"]
            self.finished = None if ended is None else dict(ended)
        other = [k for k in {**inputs, **self.inputs} if inputs.get(k) != self.inputs.get(k)]
        if other:
            raise UsageError(
                f"the run in '{self.folder}' is another one: it differs in {', '.join(sorted(other))}",
                "Resume it with the options it was started with, or give another --output.",
            )
        now = self.environment
        return [f"{k} was {before.get(k)!r} and is {now[k]!r}" for k in now if before.get(k) != now[k]]

    def finish(self, result: Mapping[str, Any]) -> None:
        """Note the result; what was kept to go on is not needed any more."""
        self.finished = dict(result)
        if distributed.is_main():
            self._write()
            self._prepared.unlink(missing_ok=True)
            self._checkpoint.unlink(missing_ok=True)

    def prepared(self, base: Family, make: Callable[[], Prepared]) -> Prepared:
        """What training starts from, made unless the run came so far before; a damaged file is a `UsageError`."""
        if not distributed.broadcast(os.path.lexists(self._prepared)):
            values, tensors = _packed(make())
            self._store(self._prepared, {**values, "prompts": base.prompts}, tensors)
        distributed.barrier()
        # Read back even if just made: sums depend on how tensors lie in memory, and a resumed run has only the file.
        with _whole(self._prepared):
            values, tensors, _ = self._open(self._prepared)
            base.prompt_ids(values["prompts"])
            found = _unpacked(values, tensors)
            _check_shapes(found, base)
            return found

    def save(self, saved: Saved) -> None:
        """Store where the run is."""
        began = time.monotonic()
        if distributed.is_main():
            self._store(self._checkpoint, *saved, log=self._logged(None))
        self._saved, self._cost = time.monotonic(), time.monotonic() - began

    def saved(self) -> Saved | None:
        """Where the run was, if it made an update; a damaged file is a `UsageError`."""
        if not distributed.broadcast(os.path.lexists(self._checkpoint)):
            return None
        with _whole(self._checkpoint):
            values, tensors, log = self._open(self._checkpoint)
        with _whole(self._log):
            if log != self._logged(values["step"]):
                raise BadFile("the log is damaged")
        return values, tensors

    def due(self, step: int) -> bool:
        """Whether to save after an update."""
        if self.save_every is not None:
            return step % self.save_every == 0
        return time.monotonic() - self._saved >= self._cost / OVERHEAD

    def log(self, done: int) -> Path:
        """The log, cut back to the updates that count."""
        if distributed.is_main():
            write_bytes(b"".join(self._lines(done)), self._log)
        return self._log

    def _logged(self, done: int | None) -> str:
        """Digest of the log, as far as its updates count."""
        return hashlib.sha256(b"".join(self._lines(done))).hexdigest()

    def _lines(self, done: int | None) -> list[bytes]:
        """Its first lines, or all: no more is read, nor longer ones, whatever lies there."""
        if not self._log.is_file():
            return []
        with self._log.open("rb") as log:
            return list(islice(iter(partial(log.readline, MAX_LINE), b""), done))

    def _store(self, path: Path, values: Mapping[str, Any], tensors: Mapping[str, Tensor], log: str = "") -> None:
        header = checksummed({"run": self._id, "digest": digest(tensors), "values": dict(values), "log": log})
        with atomic_output(path) as beside:
            write_tensors(tensors, {HEADER: json.dumps(header)}, beside)

    def _open(self, path: Path) -> tuple[dict[str, Any], dict[str, Tensor], str]:
        """Values and tensors of a file of this run, and the digest of its log, if it is whole and not another run's."""
        if not path.is_file():  # of a pipe nothing may ever come
            raise BadFile(f"'{path.name}' is no file")
        opened = open_tensors(path)
        tensors, header = opened.load(), undamaged(json.loads(opened.metadata[HEADER]))
        if header["digest"] != digest(tensors) or header["run"] != self._id:
            raise BadFile(f"'{path.name}' is damaged, or of another run")
        return dict(header["values"]), tensors, header["log"]


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Say in one sentence whatever is wrong with a file of a run."""
    try:
        yield
    except (OSError, LookupError, TypeError, ValueError, RecursionError):
        raise UsageError(f"'{path}' is damaged, or of another run or version", "Start again with --force.") from None


def _packed(prepared: Prepared) -> Saved:
    values, tensors = {}, {"prior_counts": prepared.prior_counts}
    for name, instances in (("instances", prepared.instances), ("encoded", prepared.encoded)):
        tensors[f"{name}.target"] = torch.stack([i.target for i in instances])
        tensors[f"{name}.surrogate"] = torch.stack([i.surrogate for i in instances])
        values[name] = [[i.id, list(i.prompt_ids)] for i in instances]
    for name in ("retain", "neighbours"):
        tensors.update({f"{name}.{column}": value for column, value in vars(getattr(prepared, name)).items()})
    return values, tensors


def _unpacked(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Prepared:
    def instances(name: str) -> tuple[Instance, ...]:
        rows = zip(tensors[f"{name}.target"], tensors[f"{name}.surrogate"], values[name], strict=True)
        return tuple(Instance(t, s, str(id), tuple(prompt_ids)) for t, s, (id, prompt_ids) in rows)

    retain, near = (Pool(tensors[f"{name}.x_0"], tensors[f"{name}.prompt_ids"]) for name in ("retain", "neighbours"))
    return Prepared(instances("instances"), instances("encoded"), retain, near, tensors["prior_counts"])


def _check_shapes(prepared: Prepared, base: Family) -> None:
    """BadFile for what no run of this model prepared."""
    many, sets = len(base.prompts), [(prepared.instances, base.image_shape), (prepared.encoded, base.latent_shape)]
    pools = [prepared.retain, prepared.neighbours]
    pictures = [(t, shape) for found, shape in sets for i in found for t in (i.target, i.surrogate)]
    pictures += [(x_0, base.latent_shape) for pool in pools for x_0 in pool.x_0]
    rows = [pool.prompt_ids.tolist() for pool in pools]
    ids = [id for row in [*rows, *(i.prompt_ids for found, _ in sets for i in found)] for id in row]
    right = (
        all(tuple(t.shape) == shape and t.dtype == torch.float32 and bool(t.isfinite().all()) for t, shape in pictures)
        and all(type(id) is int and 0 <= id < many for id in ids)
        and all(len(row) == len(pool) for row, pool in zip(rows, pools, strict=True))
        and all(found for found, _ in sets)
        and len(prepared.retain) > 0
        and prepared.prior_counts.ndim == 2
        and len(prepared.prior_counts) == len(prepared.encoded)
    )
    if not right:
        raise BadFile("it holds what no run of this model prepared")
