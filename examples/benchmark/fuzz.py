"""Give every command files that look sound and are hostile, by chance, and see what it answers.

    python examples/benchmark/fuzz.py [--seed 0] [--count 1000] [--only PATTERN]

The damage is of another sort than `malformed.py`'s: see `hostile.py`. Each file goes through the real command in a
process of its own. Whatever is in it, the command must end within 20 s, with no traceback nor what is taken for a bug of
ours, and take at most 512 MiB more than with the sound file. It ends with exit code 0 where the damage is harmless, with
a verdict where one was reached, else with 2 or 3 and one sentence; it writes nothing but its outputs.
"""

import argparse
import contextlib
import io
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hostile
import malformed  # sets the environment and the path of the tests
from pipelines import tiny_dit, tiny_editor, tiny_flux, tiny_pixart, tiny_sana, tiny_sd, tiny_sd3, tiny_z_image
from tables import row, table

from unforget import families
from unforget.cli import app
from unforget.families import Options
from unforget.files.patch import Patch, Provenance
from unforget.files.storage import digest

LIMIT, WAIT, MOST, ROOM = 20, 60, 512 * 2**20, 3 * 2**30
"""Seconds of the processor and of the clock; bytes beside the sound file, and beside the start that a process may take.
"""
MADE = {
    "sd1": tiny_sd, "flux1": tiny_flux, "zimage": tiny_z_image, "sana1": tiny_sana, "pixart": tiny_pixart, "dit1": tiny_dit,
}  # fmt: skip
FEW = ["--retain-count", "8", "--sampler-steps", "2", "--resize", "--force"]
TRAIN = ["--max-train-steps", "1", "--num-validation-images", "1", "-o", "y.patch", *FEW]
LEARN = ["unlearn", "-t", "target.png", "-s", "surrogate.png", *TRAIN]
EDIT = ["edit-surrogate", "-t", "target.png", "--method", "blur", *FEW]
EXPORT = ["export", "--force", "-o", "out", "--patch"]
JUDGE = ["verify", "--force", "--model", "ddpm", "--paired", "16", "--draws", "2", "--controls", "8", "--sampler-steps", "2"]
JUDGE += ["--max-rate", "0.5", "--samples", "16", "--resize", "--report", "out.json"]
RESUME = [*malformed.UNLEARN, "--model", "ddpm", "--resume"]
SINGLE = ["--model", "sd3.safetensors", "--pipeline-config"]
ENCODERS = ["--text-encoder", "clip.safetensors", "--text-encoder", "clip2.safetensors"]
OUTPUTS = re.compile(r"\.?(out|y\.patch|y\.run|x\.patch|x\.run|a\.run|cache|state|tmp|target\.surrogate\.|out\.json|summary).*")
SENTENCE = re.compile(r"^error: \S.{8,1500}$", re.MULTILINE)
VERDICT = re.compile(r"^(forgotten|failed|inconclusive|allowed): |stopped by|nothing changed|still says", re.MULTILINE)
TRACE = re.compile(r"Traceback|this is a bug|Fatal Python error|Exception ignored")


@dataclass(frozen=True)
class Kind:
    """Files of a kind by a pattern, the command that reads them ({} stands for the model's folder), and the damage."""

    name: str
    files: str
    commands: list[list[str]]
    damage: hostile.Damage


def of_models(names: list[str]) -> list[list[str]]:
    """Commands that read a folder of a model."""
    learn, edit = [*LEARN, "--model", "{}"], [*EDIT, "--model", "{}", "-o", "out.png"]
    return [learn, [*learn, "--dry-run"], edit, edit, *[[*EXPORT, "{}.patch", "--model", "{}"]] * 2]


DDPM, FOLDERS = ["--model", "ddpm"], "{ddpm,prompted,sharded,%s}" % ",".join(MADE)
MODEL = of_models([])
SHIPPED = [[*JUDGE, "-t", "target.png", "--candidate", "{}"], ["show", "{}"]]
EDITOR = [["edit-surrogate", "-t", "target.png", "--instruction", "a red one", "--editor-model", "editor", "--editor-steps", "2",
           "--candidates", "1", *FEW, *DDPM, "-o", "out.png"]]  # fmt: skip
JUDGED = [*JUDGE, "--patch", "a.patch"]
KINDS = [
    Kind("index of a model", f"{FOLDERS}/model_index.json", MODEL, hostile.table),
    Kind("scheduler", f"{FOLDERS}/scheduler/scheduler_config.json", MODEL, hostile.table),
    Kind("tokenizer", f"{FOLDERS}/tokenizer*/*.json", MODEL, hostile.table),
    Kind("words of a tokenizer", "{prompted,sd1}/tokenizer*/{merges.txt,vocab.json,tokenizer.json}", MODEL, hostile.table),
    Kind("template of a chat", "zimage/tokenizer/chat_template.jinja", MODEL, hostile.lines),
    Kind("processor", "sd1/feature_extractor/*.json", MODEL, hostile.table),
    Kind("configuration of a part", f"{FOLDERS}/{{unet,transformer,vae,text_encoder*,safety_checker}}/config.json", MODEL, hostile.table),
    Kind("weights", f"{FOLDERS}/*/*.safetensors", MODEL, hostile.tensors),
    Kind("index of shards", "sharded/transformer/*.index.json", MODEL, hostile.table),
    Kind("hints", f"{FOLDERS}/unforget.json", MODEL, hostile.table),
    Kind("single file", "sd3.safetensors", [[*EXPORT, "b.patch", *SINGLE, "prompted"], [*LEARN, *SINGLE, "prompted"]], hostile.tensors),
    Kind("text encoder", "clip*.safetensors", [[*LEARN, *SINGLE, "bare", *ENCODERS], [*EXPORT, "b.patch", *SINGLE, "bare", *ENCODERS]], hostile.tensors),
    Kind("folder of a single file", "bare/**/*.json", [[*LEARN, *SINGLE, "bare", *ENCODERS], [*LEARN, *SINGLE, "bare", *ENCODERS, "--dry-run"]], hostile.table),
    Kind("editor", "editor/**/*.json", EDITOR, hostile.table),
    Kind("weights of an editor", "editor/*/*.safetensors", EDITOR, hostile.tensors),
    Kind("card", "editor/README.md", EDITOR, hostile.lines),
    Kind("exported folder", "exported/**/*.json", SHIPPED, hostile.table),
    Kind("exported weights", "exported/*/*.safetensors", SHIPPED, hostile.tensors),
    Kind("exported file", "exported.safetensors", [[*c[:-1], "exported.safetensors"] for c in SHIPPED], hostile.tensors),
    Kind("exported LoRA", "{lora,peft}/*.safetensors", [["show", "{}"], ["verify", *JUDGE[2:], "--model", "prompted", "-t", "target.png", "--candidate", "{}"]], hostile.tensors),
    Kind("exported LoRA's words", "{lora,peft}/*.json", [["show", "{}"], ["verify", *JUDGE[2:], "--model", "prompted", "-t", "target.png", "--candidate", "{}"]], hostile.table),
    Kind("patch", "a.patch", [["show", "a.patch"], [*JUDGED, "-t", "target.png"], [*EXPORT, "a.patch", *DDPM], [*LEARN, *DDPM, "--patch", "a.patch"],
                              [*JUDGED, "--dry-run"]], hostile.tensors),
    Kind("patch of a LoRA", "l.patch", [["show", "l.patch"], [*EXPORT, "l.patch", "--model", "prompted", "--format", "lora"],
                                        ["unlearn", "-t", "donor.png", "-s", "target.png", *TRAIN, "--model", "prompted", "--patch", "l.patch"]], hostile.tensors),
    Kind("run", "x.run/run.json", [RESUME], hostile.table),
    Kind("run's tensors", "x.run/*.safetensors", [RESUME], hostile.tensors),
    Kind("run's log", "x.run/metrics.jsonl", [RESUME], hostile.lines),
    Kind("run's pictures", "a.run/*.png", [JUDGED, [*LEARN, *DDPM, "--patch", "a.patch"]], hostile.picture),
    Kind("report", "report.json", [[*EXPORT, "a.patch", *DDPM, "--report", "report.json"]], hostile.table),
    Kind("report of a run", "a.run/verify.json", [["show", "a.patch"], [*EXPORT, "a.patch", *DDPM]], hostile.table),
    Kind("target", "target.png", [[*LEARN, *DDPM], [*JUDGED, "-t", "target.png"], [*EDIT, *DDPM, "-o", "out.png"]], hostile.picture),
    Kind("surrogate", "surrogate.png", [[*LEARN, *DDPM], [*JUDGED, "-t", "target.png", "-s", "surrogate.png"]], hostile.picture),
    Kind("retained picture", "retain/*.png", [[*LEARN, *DDPM, "--retain", "retain"], [*JUDGED, "-t", "target.png", "--must-retain", "retain/0.png"]], hostile.picture),
    Kind("mask", "mask.png", [[*EDIT[:3], "--mask", "mask.png", "--candidates", "1", "--editor-steps", "2", *FEW, *DDPM, "-o", "out.png"]], hostile.picture),
    Kind("donor", "donor.png", [[*EDIT[:3], "--donor", "donor.png", *FEW, *DDPM, "-o", "out.png"]], hostile.picture),
    Kind("picture of a card", "retain/0.png", [[*EXPORT, "a.patch", *DDPM, "--card-images", "retain"]], hostile.picture),
    Kind("policy", "{unforget,pyproject}.toml", [[*JUDGED, "--policy", "{}"]], hostile.settings),
    Kind("configuration", "config.toml", [["unlearn", *DDPM, "--force", "-o", "y.patch", "--max-train-steps", "1", "--config", "config.toml"],
                                          ["edit-surrogate", *EDIT[1:5], *DDPM, "--force", "-o", "out.png", "--config", "config.toml"],
                                          [*EXPORT, "a.patch", *DDPM, "--config", "config.toml"], [*JUDGED, "--config", "config.toml"]], hostile.settings),
    Kind("prompts", "prompts.txt", [[*LEARN, "--model", "prompted", "--retain-prompts", "prompts.txt"],
                                    [*EDIT, "--model", "prompted", "--retain-prompts", "prompts.txt", "-o", "out.png"]], hostile.lines),
    Kind("similarity", "m.{onnx,pt}", [[*JUDGED, "-t", "target.png", "--similarity", "sscd={}"]], hostile.other),
    Kind("cache", "cache/*.safetensors", [[*LEARN, *DDPM], ["cache"], ["cache", "--clear"]], hostile.tensors),
    Kind("cached figures", "cache/*.json", [[*JUDGED, "-t", "target.png"]], hostile.table),
    Kind("secret", "state/unforget/cache.key", [[*LEARN, *DDPM]], hostile.other),
    Kind("summary", "summary.md", [[*JUDGED, "-t", "target.png", "--summary", "summary.md"]], hostile.other),
]  # fmt: skip


def sound(home: Path) -> None:
    """One sound file of every kind, beside those of `malformed`."""
    malformed.sound(home)
    for name, make in MADE.items():
        pipeline = make()
        pipeline.save_pretrained(home / name)
        (home / name / "unforget.json").write_text('{"retain_prompts": ["a red square", "the green star"]}')
        loaded = families.load(str(home / name), Options())  # and all that it imports
        state = loaded.network.state_dict()
        made = Provenance(base=name, base_digest=digest(state), targets=[], surrogates=[], recipe={}, seed=0, steps=1, versions={})
        first = next(n for n, t in state.items() if t.ndim == 2)
        Patch({first: state[first] + 0.01}, made).save(home / f"{name}.patch")
    (home / "ddpm" / "unforget.json").write_text("{}")
    for name in ("prompted", "sharded"):
        shutil.copy(home / "b.patch", home / f"{name}.patch")
    shutil.copy(home / "a.patch", home / "ddpm.patch")
    tiny_editor(tiny_sd3()).save_pretrained(home / "editor")
    (home / "editor" / "README.md").write_text("---\nlicense: cc0-1.0\n---\nAn editor.\n")
    shutil.copytree(home / "prompted", home / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    for name, part in (("clip", "text_encoder"), ("clip2", "text_encoder_2")):
        shutil.copy(home / "prompted" / part / "model.safetensors", home / f"{name}.safetensors")
    for folder in ("retain", "a.run"):
        (home / folder).mkdir()
    for k in range(3):
        shutil.copy(home / "target.png", home / "retain" / f"{k}.png")
    for name in ("target", "surrogate"):
        shutil.copy(home / f"{name}.png", home / "a.run" / f"{name}-0.png")
    shutil.copy(home / "surrogate.png", home / "donor.png")
    (home / "prompts.txt").write_text("a red square\na blue circle\n")
    (home / "summary.md").write_text("# Summary\n")
    (home / "pyproject.toml").write_text("[tool.unforget.verify]\nlevel = 'quick'\npaired = 16\n")
    (home / "unforget.toml").write_text("[verify]\nlevel = 'quick'\npaired = 16\n")
    malformed.begun(home)
    exported = [*EXPORT, "a.patch", *DDPM]
    for command in (
        [*JUDGED, "-t", "target.png"], [*LEARN, "--model", "prompted", "-o", "l.patch"], [*exported, "-o", "exported"],
        [*exported, "--format", "transformer", "-o", "exported.safetensors"], EDITOR[0],
        *([*EXPORT, "l.patch", "--model", "prompted", "--format", kind, "-o", kind] for kind in ("lora", "peft")),
    ):  # fmt: skip
        with contextlib.chdir(home), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            with contextlib.suppress(SystemExit):
                app(command)
    assert all((home / n).exists() for n in ("exported", "lora", "peft", "exported.safetensors", "l.patch", "a.run/verify.json")), said.getvalue()


def matching(home: Path, pattern: str) -> list[Path]:
    """Files by a pattern with alternatives in braces."""
    if found := re.search(r"\{([^{}]*)\}", pattern):
        return [p for one in found[1].split(",") for p in matching(home, pattern[: found.start()] + one + pattern[found.end() :])]
    return sorted(p.relative_to(home) for p in home.glob(pattern) if p.is_file())


def commands(home: Path, kind: Kind) -> list[list[str]]:
    """All commands that read files of a kind."""
    named = dict.fromkeys(path.parts[0] for path in matching(home, kind.files))
    return [filled(command, name) for name in named for command in kind.commands]


def filled(command: list[str], name: str) -> list[str]:
    """A command that reads what is called so; models that draw 256 pixels draw fewer."""
    small = ["--resolution", "32"] if name in ("flux1", "zimage") and command[0] != "show" else []
    return [word.replace("{}", name) for word in command] + small


def damage(here: Path, path: Path, kind: Kind, draw: random.Random) -> str:
    """Damage a file, and say how."""
    if draw.random() < 0.12:
        return hostile.in_its_place(here / path, draw)
    content = (here / path).read_bytes()
    others = [p.read_bytes() for p in sorted(here.rglob(f"*{path.suffix}"))[:40] if p.is_file() and p != here / path]
    how = hostile.lines if path.suffix in (".txt", ".jinja", ".md") else kind.damage
    said, left = how(content, draw, draw.sample(others, min(len(others), 5)))
    (here / path).write_bytes(left)
    return said


def limited(nobody: bool) -> None:
    """What is said of a hostile file's process: how much memory, and, where rights matter, whose it is."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT + 1))
    if nobody:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """All that lies in a folder, with sizes and times."""
    return {str(p.relative_to(folder)): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*") if not p.is_dir()}


def fresh(home: Path, here: Path) -> Path:
    """The sound files once more: what is not as it was goes, or comes again."""
    wanted, found = listing(home), listing(here)
    for name in [n for n in found if found[n] != wanted.get(n)]:
        (here / name).unlink()
    for path in [p for p in here.rglob("*") if p.is_dir() and not (home / p.relative_to(here)).is_dir()]:
        shutil.rmtree(path, ignore_errors=True)
    for name in [n for n in wanted if wanted[n] != found.get(n)]:
        (here / name).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy2(home / name, here / name)
    return here


def faults(code: int, said: str, over: int, changed: list[str]) -> Iterator[str]:
    """What a command did that none may."""
    late = code in (-1, 128 + signal.SIGXCPU, 128 + signal.SIGKILL)
    if TRACE.search(said) or code == 99 or (code > 128 and not late):
        yield "traceback"
    if late:
        yield "hang"
    if over > MOST or "out of memory" in said:
        yield "memory"
    if changed:
        yield "written elsewhere"
    told = len(SENTENCE.findall(said)) == 1
    if not (code == 0 or (code in (2, 3) and told) or (code in (1, 4) and VERDICT.search(said))) and not late:
        yield "wrong exit"


COLUMNS = ("traceback", "hang", "memory", "wrong exit", "written elsewhere")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first file, to go on from there")
    parser.add_argument("--only", default="", metavar="PATTERN")
    parser.add_argument("--sound", action="store_true", help="try every command on sound files first")
    given = parser.parse_args()
    kinds = [k for k in KINDS if re.search(given.only, k.name)]
    total, bad, slowest = Counter[tuple[str, str]](), [], Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        home, here, scratch = (Path(name) / n for n in ("sound", "here", "tmp"))
        for folder in (home, scratch):
            folder.mkdir(mode=0o777)
        os.environ.update(UNFORGET_CACHE="cache", XDG_STATE_HOME="state", TMPDIR=str(scratch), TOKENIZERS_PARALLELISM="false")
        tempfile.tempdir = str(scratch)
        sound(home)
        Path(name).chmod(0o755)
        for command in {tuple(c): c for k in kinds for c in commands(home, k)}.values() if given.sound else ():
            code, said, _, seconds = malformed.ask(fresh(home, here), command, WAIT)
            print(f"{seconds:5.1f} s, exit {code}: {' '.join(command)}", said[-400:] * (code not in (0, 1, 4)), flush=True)
        for number in range(given.first, given.first + given.count):
            kind, draw = kinds[number % len(kinds)], random.Random(f"{given.seed}/{given.only}/{number}")
            path = draw.choice(matching(home, kind.files))
            command = filled(draw.choice(kind.commands), path.parts[0])
            fresh(home, here)
            how = damage(here, path, kind, draw)
            nobody = how == "closed" and os.geteuid() == 0
            if nobody:
                for found in [here, *here.rglob("*"), scratch]:
                    os.lchown(found, 65534, 65534)
            before = listing(here)
            code, said, peak, seconds = malformed.ask(here, command, WAIT, lambda: limited(nobody))  # noqa: B023
            after = listing(here)
            changed = [n for n in before.keys() | after.keys() if before.get(n) != after.get(n) and not OUTPUTS.fullmatch(n)]
            if peak > MOST:  # else it is below that beside the sound file, too
                peak -= malformed.ask(fresh(home, here), command)[2]
            found = list(faults(code, said, peak, changed))
            if os.environ.get("FUZZ_LOG"): print(f"# {number} {kind.name} {path} {how[:60]} {code} {seconds:.1f}", flush=True)
            total.update([(kind.name, "files"), (kind.name, f"exit {code}"), *((kind.name, fault) for fault in found)])
            slowest[kind.name] = max(slowest[kind.name], round(seconds * 10))
            if found:
                bad.append(f"{number}: {kind.name}, {path}, {how[:100]}: {', '.join(found)}; exit {code}, {seconds:.1f} s, "
                           f"{peak / 2**20:.0f} MiB, {changed[:3]}: {' '.join(command)}\n    {said.strip()[-600:]}")  # fmt: skip
                print(bad[-1], flush=True)
    table("file", "files", "exit 0, 1 or 4", "exit 2 or 3", *COLUMNS, "slowest, s")
    for kind in kinds:
        ended = [sum(total[kind.name, f"exit {c}"] for c in codes) for codes in ((0, 1, 4), (2, 3))]
        row(kind.name, total[kind.name, "files"], *ended, *(total[kind.name, c] for c in COLUMNS), f"{slowest[kind.name] / 10:.1f}")
    print(f"{given.count} files; {len(bad)} not as promised", flush=True)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
