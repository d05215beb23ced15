"""Give every command files that look sound and are hostile, by chance, and see what it answers.

    python examples/benchmark/fuzz.py [--seed 0] [--count 1000] [--only PATTERN]

The damage is of another sort than `malformed.py`'s: see `hostile.py`. Each file goes through the real command in a
process of its own. Whatever is in it, the command must end within 20 s of the processor (60 s of the clock), with no
traceback nor what is taken for a bug of ours, and take at most 512 MiB more than with the sound file. It ends with exit
code 0 where the damage is harmless, with a verdict where one was reached, else with 2 or 3 and one sentence; it writes
nothing but its outputs.
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
    "sd1": tiny_sd, "flux1": tiny_flux, "zimage": tiny_z_image, "sana1": tiny_sana, "pixart": tiny_pixart,
    "dit1": tiny_dit,
}  # fmt: skip
FEW = ["--retain-count", "8", "--sampler-steps", "2", "--resize", "--force"]
TRAIN = ["--max-train-steps", "1", "--num-validation-images", "1", "-o", "y.patch", *FEW]
TARGET, OUT = ["-t", "target.png"], ["-o", "out.png"]
LEARN = ["unlearn", *TARGET, "-s", "surrogate.png", *TRAIN]
FROM = ["edit-surrogate", *TARGET]
EDIT = [*FROM, "--method", "blur", *FEW]
SLOW = ["--candidates", "1", "--editor-steps", "2", *FEW]
EXPORT = ["export", "--force", "-o", "out", "--patch"]
DDPM, SD3 = ["--model", "ddpm"], ["--model", "prompted"]
HASTY = [
    "--force", "--paired", "16", "--draws", "2", "--controls", "8", "--sampler-steps", "2", "--max-rate", "0.5",
    "--samples", "16", "--resize", "--report", "out.json",
]  # fmt: skip
JUDGE = ["verify", *DDPM, *HASTY]
JUDGED = [*JUDGE, "--patch", "a.patch"]
RESUME = [*malformed.UNLEARN, *DDPM, "--resume"]
SINGLE = ["--model", "sd3.safetensors", "--pipeline-config"]
BARE = [*SINGLE, "bare", "--text-encoder", "clip.safetensors", "--text-encoder", "clip2.safetensors"]
EDITOR = [
    [*FROM, "--instruction", "a red one", "--editor-model", "editor", *SLOW, *DDPM, *OUT],
]  # fmt: skip
OUTPUTS = re.compile(r"\.?(out|[xy]\.(patch|run)|a\.run|cache|state|tmp|target\.surrogate\.|summary).*")
SENTENCE = re.compile(r"^error: \S.{8,1500}$", re.MULTILINE)
VERDICT = re.compile(r"^(forgotten|failed|inconclusive|allowed): | updates: |nothing changed|still says", re.MULTILINE)
TRACE = re.compile(r"Traceback|this is a bug|Fatal Python error|Exception ignored")


@dataclass(frozen=True)
class Kind:
    """Files of a kind by a pattern, the command that reads them ({} stands for the model's folder), and the damage."""

    name: str
    files: str
    commands: list[list[str]]
    damage: hostile.Damage


FOLDERS = ",".join(["{ddpm", "prompted", "sharded", *MADE]) + "}"
MODEL = [
    [*LEARN, "--model", "{}"], [*LEARN, "--model", "{}", "--dry-run"], *[[*EDIT, "--model", "{}", *OUT]] * 2,
    *[[*EXPORT, "{}.patch", "--model", "{}"]] * 2,
]  # fmt: skip
SHIPPED = [[*JUDGE, *TARGET, "--candidate", "{}"], ["show", "{}"]]
ADAPTER = [["verify", *SD3, *HASTY, *TARGET, "--candidate", "{}"], ["show", "{}"]]
EXPORTED = [*EXPORT, "a.patch", *DDPM]
PARTS = "{unet,transformer,vae,text_encoder*,safety_checker}"
TABLE, TENSORS, PICTURE, LINES = hostile.table, hostile.tensors, hostile.picture, hostile.lines
KINDS = [
    Kind("index of a model", f"{FOLDERS}/model_index.json", MODEL, TABLE),
    Kind("scheduler", f"{FOLDERS}/scheduler/scheduler_config.json", MODEL, TABLE),
    Kind("tokenizer", f"{FOLDERS}/tokenizer*/*.json", MODEL, TABLE),
    Kind("words of a tokenizer", "{prompted,sd1}/tokenizer*/{merges.txt,vocab.json,tokenizer.json}", MODEL, TABLE),
    Kind("template of a chat", "zimage/tokenizer/chat_template.jinja", MODEL, LINES),
    Kind("processor", "sd1/feature_extractor/*.json", MODEL, TABLE),
    Kind("configuration of a part", f"{FOLDERS}/{PARTS}/config.json", MODEL, TABLE),
    Kind("weights", f"{FOLDERS}/*/*.safetensors", MODEL, TENSORS),
    Kind("index of shards", "sharded/transformer/*.index.json", MODEL, TABLE),
    Kind("hints", f"{FOLDERS}/unforget.json", MODEL, TABLE),
    Kind(
        "single file", "sd3.safetensors",
        [[*EXPORT, "b.patch", *SINGLE, "prompted"], [*LEARN, *SINGLE, "prompted"]], TENSORS,
    ),
    Kind("text encoder", "clip*.safetensors", [[*LEARN, *BARE], [*EXPORT, "b.patch", *BARE]], TENSORS),
    Kind("folder of a single file", "bare/**/*.json", [[*LEARN, *BARE], [*LEARN, *BARE, "--dry-run"]], TABLE),
    Kind("editor", "editor/**/*.json", EDITOR, TABLE),
    Kind("weights of an editor", "editor/*/*.safetensors", EDITOR, TENSORS),
    Kind("card", "editor/README.md", EDITOR, LINES),
    Kind("exported folder", "exported/**/*.json", SHIPPED, TABLE),
    Kind("exported weights", "exported/*/*.safetensors", SHIPPED, TENSORS),
    Kind("exported file", "exported.safetensors", SHIPPED, TENSORS),
    Kind("exported LoRA", "{lora,peft}/*.safetensors", ADAPTER, TENSORS),
    Kind("exported LoRA's words", "{lora,peft}/*.json", ADAPTER, TABLE),
    Kind(
        "patch", "a.patch",
        [["show", "a.patch"], [*JUDGED, *TARGET], EXPORTED, [*LEARN, *DDPM, "--patch", "a.patch"],
         [*JUDGED, "--dry-run"]], TENSORS,
    ),
    Kind(
        "patch of a LoRA", "l.patch",
        [["show", "l.patch"], [*EXPORT, "l.patch", *SD3, "--format", "lora"],
         ["unlearn", "-t", "donor.png", "-s", "target.png", *TRAIN, *SD3, "--patch", "l.patch"]], TENSORS,
    ),
    Kind("run", "x.run/run.json", [RESUME], TABLE),
    Kind("run's tensors", "x.run/*.safetensors", [RESUME], TENSORS),
    Kind("run's log", "x.run/metrics.jsonl", [RESUME], LINES),
    Kind("run's pictures", "a.run/*.png", [JUDGED, [*LEARN, *DDPM, "--patch", "a.patch"]], PICTURE),
    Kind("report", "report.json", [[*EXPORTED, "--report", "report.json"]], TABLE),
    Kind("report of a run", "a.run/verify.json", [["show", "a.patch"], EXPORTED], TABLE),
    Kind("target", "target.png", [[*LEARN, *DDPM], [*JUDGED, *TARGET], [*EDIT, *DDPM, *OUT]], PICTURE),
    Kind("surrogate", "surrogate.png", [[*LEARN, *DDPM], [*JUDGED, *TARGET, "-s", "surrogate.png"]], PICTURE),
    Kind(
        "retained picture", "retain/*.png",
        [[*LEARN, *DDPM, "--retain", "retain"], [*JUDGED, *TARGET, "--must-retain", "retain/0.png"]], PICTURE,
    ),
    Kind("mask", "mask.png", [[*FROM, "--mask", "mask.png", *SLOW, *DDPM, *OUT]], PICTURE),
    Kind("donor", "donor.png", [[*FROM, "--donor", "donor.png", *FEW, *DDPM, *OUT]], PICTURE),
    Kind("picture of a card", "retain/0.png", [[*EXPORTED, "--card-images", "retain"]], PICTURE),
    Kind("policy", "{unforget,pyproject}.toml", [[*JUDGED, "--policy", "{}"]], hostile.settings),
    Kind(
        "configuration", "config.toml",
        [[*words, "--config", "config.toml"] for words in (
            ["unlearn", *DDPM, "--force", "-o", "y.patch", "--max-train-steps", "1"], JUDGED, EXPORTED,
            [*FROM, "--method", "blur", *DDPM, "--force", *OUT],
        )], hostile.settings,
    ),
    Kind(
        "prompts", "prompts.txt",
        [[*words, *SD3, "--retain-prompts", "prompts.txt"] for words in (LEARN, [*EDIT, *OUT])], LINES,
    ),
    Kind("similarity", "m.{onnx,pt}", [[*JUDGED, *TARGET, "--similarity", "sscd={}"]], hostile.other),
    Kind("cache", "cache/*.safetensors", [[*LEARN, *DDPM], ["cache"], ["cache", "--clear"]], TENSORS),
    Kind("cached figures", "cache/*.json", [[*JUDGED, *TARGET]], TABLE),
    Kind("secret", "state/unforget/cache.key", [[*LEARN, *DDPM]], hostile.other),
    Kind("summary", "summary.md", [[*JUDGED, *TARGET, "--summary", "summary.md"]], hostile.other),
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
        nothing: dict = {"targets": [], "surrogates": [], "recipe": {}, "seed": 0, "steps": 1, "versions": {}}
        first = next(n for n, t in state.items() if t.ndim == 2)
        made = Provenance(base=name, base_digest=digest(state), **nothing)
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
    for command in (
        [*JUDGED, *TARGET], [*LEARN, *SD3, "-o", "l.patch"], [*EXPORTED, "-o", "exported"], EDITOR[0],
        [*EXPORTED, "--format", "transformer", "-o", "exported.safetensors"],
        *([*EXPORT, "l.patch", *SD3, "--format", kind, "-o", kind] for kind in ("lora", "peft")),
    ):  # fmt: skip
        said = io.StringIO()
        left = contextlib.suppress(SystemExit)
        with contextlib.chdir(home), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), left:
            app(command)
    made = ("exported", "lora", "peft", "exported.safetensors", "l.patch", "a.run/verify.json")
    assert all((home / name).exists() for name in made), said.getvalue()


def matching(home: Path, pattern: str) -> list[Path]:
    """Files by a pattern with alternatives in braces."""
    if found := re.search(r"\{([^{}]*)\}", pattern):
        whole = [pattern[: found.start()] + one + pattern[found.end() :] for one in found[1].split(",")]
        return [path for one in whole for path in matching(home, one)]
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
    found = [(str(p.relative_to(folder)), p.lstat()) for p in folder.rglob("*") if not p.is_dir()]
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found}


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
    if not (late or code == 0 or (code in (2, 3) and told) or (code in (1, 4) and VERDICT.search(said))):
        yield "wrong exit"


COLUMNS = ("traceback", "hang", "memory", "wrong exit", "written elsewhere")


def hostile_file(home: Path, here: Path, kind: Kind, draw: random.Random) -> tuple[str, int, float, list[str]]:
    """One of a kind, by chance: what it was, and the exit code, seconds and faults of the command that reads it."""
    path = draw.choice(matching(home, kind.files))
    command = filled(draw.choice(kind.commands), path.parts[0])
    how = damage(fresh(home, here), path, kind, draw)
    nobody = how == "closed" and os.geteuid() == 0  # whom rights do not stop
    for found in [here, *here.rglob("*"), here.parent / "tmp"] if nobody else ():
        os.lchown(found, 65534, 65534)
    before = listing(here)
    code, said, peak, seconds = malformed.ask(here, command, WAIT, lambda: limited(nobody))
    after = listing(here)
    changed = [n for n in {**before, **after} if before.get(n) != after.get(n) and not OUTPUTS.fullmatch(n)]
    if peak > MOST:  # else it is below that beside the sound file, too
        peak -= malformed.ask(fresh(home, here), command, WAIT)[2]
    faulty = list(faults(code, said, peak, changed))
    name = f"{path}, {how[:100]}: exit {code}, {seconds:.1f} s, {peak / 2**20:.0f} MiB, {changed[:3]}"
    return f"{name}: {' '.join(command)}\n    {said.strip()[-600:]}", code, seconds, faulty


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first file, to go on from there")
    parser.add_argument("--only", default="", metavar="PATTERN")
    parser.add_argument("--sound", action="store_true", help="try every command on sound files first")
    given = parser.parse_args()
    kinds = [k for k in KINDS if re.search(given.only, k.name)]
    total, bad, slowest = Counter[tuple[str, str]](), 0, Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        home, here, scratch = (Path(name) / n for n in ("sound", "here", "tmp"))
        for folder in (home, here, scratch):
            folder.mkdir()
        os.environ.update(
            UNFORGET_CACHE="cache", XDG_STATE_HOME="state", TMPDIR=str(scratch), TOKENIZERS_PARALLELISM="false"
        )
        tempfile.tempdir = str(scratch)
        sound(home)
        Path(name).chmod(0o755)
        for command in {tuple(c): c for k in kinds for c in commands(home, k)}.values() if given.sound else ():
            code, said, _, seconds = malformed.ask(fresh(home, here), command, WAIT)
            print(f"{seconds:5.1f} s, exit {code}: {' '.join(command)}", said[-400:] * (code not in (0, 1, 4)))
        for number in range(given.first, given.first + given.count):
            kind, draw = kinds[number % len(kinds)], random.Random(f"{given.seed}/{given.only}/{number}")
            what, code, seconds, faulty = hostile_file(home, here, kind, draw)
            total.update((kind.name, thing) for thing in ("files", f"exit {code}", *faulty))
            slowest[kind.name] = max(slowest[kind.name], round(seconds * 10))
            if faulty:
                bad += 1
                print(f"{number}: {kind.name}: {', '.join(faulty)}: {what}", flush=True)
            if number % 100 == 99:
                print(f"{number + 1 - given.first} files, {bad} not as promised so far", file=sys.stderr, flush=True)
    table("file", "files", "exit 0, 1 or 4", "exit 2 or 3", *COLUMNS, "slowest, s")
    for kind in kinds:
        ended = [sum(total[kind.name, f"exit {c}"] for c in codes) for codes in ((0, 1, 4), (2, 3))]
        found = [total[kind.name, column] for column in COLUMNS]
        row(kind.name, total[kind.name, "files"], *ended, *found, f"{slowest[kind.name] / 10:.1f}")
    print(f"{given.count} files; {bad} not as promised")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
