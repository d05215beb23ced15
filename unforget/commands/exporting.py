"""`export`: base plus patch in a form that stock loaders open."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from unforget import data, families
from unforget.commands.common import load, options, writable
from unforget.config import ExportConfig
from unforget.domain import Family, Listener
from unforget.errors import CannotRun, UsageError
from unforget.metrics import rms
from unforget.patch import Stack
from unforget.storage import digest


def export(config: ExportConfig, listener: Listener | None = None) -> Path:
    """Write base plus patch as a checkpoint, or the patch as a LoRA, that the stock loader opens, and open it."""
    listener = listener or Listener()
    writable(config.output, config.force)
    stack = Stack.load(config.patch, config.scale)
    patch = stack.patches[0]
    if config.format == "lora" and patch.provenance.adapter is None:
        raise UsageError("the patch holds whole weights, not a LoRA", "Unlearn with --train lora, or export diffusers.")
    family = load(config)
    base = family.copy() if config.format == "lora" else None
    stack.apply(family.network, name=config.model)
    beside = config.output.with_name(f".{config.output.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        listener.stage("export", 2)
        if base is None:
            family.save(beside)
            again = families.load(str(beside), options(config, family))
        else:
            assert patch.provenance.adapter is not None
            base.save_lora(beside, patch.tensors, **patch.provenance.adapter)
            again = base.load_lora(beside)
        listener.advance(1)
        _same(again, family, config.seed, exact=base is None)
        listener.advance(1)
        if config.output.exists():
            shutil.rmtree(config.output)
        os.replace(beside, config.output)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return config.output


def _same(again: Family, family: Family, seed: int, *, exact: bool) -> None:
    """Refuse a checkpoint that was not read back as what was written: weights, and the picture drawn from one seed."""
    noise = data.random_noise(1, family.shape, seed, "export")
    prompt = family.retain_prompts[:1]
    pictures = [data.draw(f, noise, steps=4, condition=f.condition(prompt)) for f in (again, family)]
    weights = [digest(f.network.state_dict()) if exact else "" for f in (again, family)]
    # Equal weights may still be added up in another order (kernels depend on how memory is aligned), and a LoRA beside
    # a weight rounds otherwise than one merged into it.
    if weights[0] != weights[1] or float(rms(*pictures)) > (1e-3 if exact else 1e-2):
        raise CannotRun("the checkpoint does not read back as it was written", "Nothing was kept; check the disk.")
