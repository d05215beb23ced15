"""Pushes against a stub of the hub's API on this machine.

The pushes run in other processes: huggingface_hub reads its environment once, when it is imported, and this one is
offline.
"""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from huggingface_hub.utils import are_progress_bars_disabled

from unforget.errors import HIDDEN, CannotRun, UsageError, redacted
from unforget.exports.hub import push

pytestmark = pytest.mark.hub
TOKEN = "hf_abcdefghijKLMNOPQRST0123456789wxyz"
STORAGE = "signature=c2VjcmV0"
CHILD = """
import json, sys, traceback
from pathlib import Path
from unforget.errors import UnforgetError
from unforget.exports.hub import push
for line in sys.stdin:
    given = json.loads(line)
    try:
        found = {"url": push(Path(given.pop("path")), **given)}
    except UnforgetError as error:
        said = {"kind": type(error).__name__, "code": error.code, "message": error.message, "hint": error.hint}
        found = {**said, "traceback": traceback.format_exc()}
    print(json.dumps(found), flush=True)
"""


class Hub:
    """What the hub keeps, and how it answers: the requests that huggingface_hub 2.4 makes for a push."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.repos: dict[str, dict] = {}
        self.storage: dict[str, bytes] = {}
        self.chunks = b""
        self.requests: list[tuple[str, str, str | None]] = []
        self.wrong: list[str] = []
        self.refusals: dict[str, tuple[int, dict, dict]] = {}
        """Answers in place of the right one, by what the path has to hold: status, headers, body."""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, object]:
        path, _, query = path.partition("?")
        parts = path.strip("/").split("/")
        match parts:
            case ["api", "agent-harnesses"]:
                return 200, {"standardEnvVars": [], "harnesses": {}}
            case ["api", "repos", "create"]:
                return self.create(json.loads(body))
            case ["api", "validate-yaml"]:
                return self.validate(json.loads(body))
            case ["storage", oid]:
                assert (method, query) == ("PUT", STORAGE)
                assert hashlib.sha256(body).hexdigest() == oid
                self.storage[oid] = body
                return 200, {}
            case ["verify"]:
                return self.verify(json.loads(body))
            case [owner, name, "info", "lfs", "objects", "batch"]:
                assert f"{owner}/{name.removesuffix('.git')}" in self.repos
                return 200, self.batch(json.loads(body))
            case ["cas", *rest]:
                return self.cas(rest, body)
            case ["api", "models", owner, name, *rest] if f"{owner}/{name}" in self.repos:
                return self.model(f"{owner}/{name}", rest, body)
        return 404, {"error": "Repository not found"}

    def create(self, asked: dict) -> tuple[int, object]:
        repo = f"{asked['organization'] or 'me'}/{asked['name']}"
        if repo in self.repos:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{repo}"}
        self.repos[repo] = {"private": asked["visibility"] == "private", "files": {}, "oids": {}, "messages": []}
        return 200, {"url": f"{self.url}/{repo}", "name": repo}

    def validate(self, asked: dict) -> tuple[int, object]:
        found = yaml.safe_load(asked["content"].split("---\n")[1])
        errors = [] if found.get("license") in ("mit", "other") else [{"message": '"license" must be one of [mit]'}]
        return (400 if errors else 200), {"errors": errors, "warnings": []}

    def batch(self, asked: dict) -> object:
        assert asked["operation"] == "upload" and "basic" in asked["transfers"]
        actions = {"verify": {"href": f"{self.url}/verify"}}
        return {"transfer": "basic", "objects": [
            {**o, "actions": {**actions, "upload": {"href": f"{self.url}/storage/{o['oid']}?{STORAGE}"}}}
            for o in asked["objects"]
        ]}  # fmt: skip

    def verify(self, asked: dict) -> tuple[int, object]:
        assert len(self.storage[asked["oid"]]) == asked["size"]
        return 200, {}

    def cas(self, rest: list[str], body: bytes) -> tuple[int, object]:
        """The storage behind xet: as little of it as lets hf_xet 1.8 finish."""
        if rest[:2] == ["v1", "xorbs"]:
            self.chunks += unpacked(body)
            return 200, {"was_inserted": True}
        return (200, {"result": 1}) if rest == ["v1", "shards"] else (404, {})

    def model(self, repo: str, rest: list[str], body: bytes) -> tuple[int, object]:
        kept = self.repos[repo]
        match rest:
            case [] | ["revision", "main"]:
                return 200, {"id": repo, "private": kept["private"], "sha": f"{len(kept['messages']):040x}"}
            case ["xet-write-token", "main"]:
                return 200, {"casUrl": f"{self.url}/cas", "exp": int(time.time()) + 3600, "accessToken": "of-the-cas"}
            case ["preupload", "main"]:
                return 200, {"files": [
                    {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                     "shouldIgnore": False, "oid": kept["oids"].get(f["path"])}
                    for f in json.loads(body)["files"]
                ]}  # fmt: skip
            case ["commit", "main"]:
                header, *operations = [json.loads(line) for line in body.splitlines()]
                kept["messages"].append(header["value"]["summary"])
                for operation in operations:
                    self.keep(kept, operation["key"], operation["value"])
                oid = f"{len(kept['messages']):040x}"
                return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo}/commit/{oid}"}
        return 404, {"error": "Not found"}

    def keep(self, kept: dict, key: str, value: dict) -> None:
        if key == "file":
            content = base64.b64decode(value["content"])
            kept["oids"][value["path"]] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        else:
            content = self.storage.get(value["oid"]) or self.chunks
            assert (key, value["algo"], value["size"]) == ("lfsFile", "sha256", len(content))
            assert hashlib.sha256(content).hexdigest() == value["oid"]
            kept["oids"][value["path"]] = value["oid"]
        kept["files"][value["path"]] = content

    def asked(self, part: str) -> bool:
        return any(part in path for _, path, _ in self.requests)


def unpacked(xorb: bytes) -> bytes:
    """The chunks of a xorb that were stored as they are, as random ones must be: a head of eight bytes, the bytes."""
    found = b""
    while xorb:
        size = int.from_bytes(xorb[1:4], "little")
        assert xorb[0] == 0 and xorb[4] == 0, "packed, which this stub cannot read"
        found, xorb = found + xorb[8 : 8 + size], xorb[8 + size :]
    return found


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer waits 40 ms
    hub: Hub

    def serve(self) -> None:
        body, auth = self.body(), self.headers.get("Authorization")
        self.hub.requests.append((self.command, self.path, auth))
        try:
            for part, (status, headers, answer) in self.hub.refusals.items():
                if part in self.path:
                    return self.reply(status, {k: v.format(auth=auth) for k, v in headers.items()}, answer)
            self.allowed(auth)
            status, answer = self.hub.answer(self.command, self.path, body)
            self.reply(status, {"X-Error-Code": "RepoNotFound"} if status == 404 else {}, answer)
        except Exception as error:
            self.hub.wrong.append(f"{self.command} {self.path}: {error!r}")
            self.reply(400, {}, {"error": "the stub did not expect that"})

    def allowed(self, auth: str | None) -> None:
        """The token goes to the hub, and nowhere else."""
        if self.path.startswith(("/storage/", "/api/agent-harnesses")):
            assert auth is None
        elif self.path.startswith(("/cas/", "/v1/telemetry")):
            assert auth == "Bearer of-the-cas"
        else:
            assert auth == f"Bearer {TOKEN}", auth

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def reply(self, status: int, headers: dict, answer: object) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        for key, value in {**headers, "Content-Type": "application/json", "Content-Length": len(content)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_HEAD = serve

    def log_message(self, *_) -> None:
        pass


@pytest.fixture(scope="module")
def server():
    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


@pytest.fixture
def hub(server):
    Handler.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    yield Handler.hub
    assert not Handler.hub.wrong


@pytest.fixture(scope="module")
def children(server, tmp_path_factory):
    """Processes that push, one for each environment, each with a home of its own."""
    started, home = {}, tmp_path_factory.mktemp("home")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    kept |= {"NO_PROXY": "*", "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_TOKEN": TOKEN}
    kept |= {"HF_HUB_DISABLE_XET": "1"}  # a large file goes through LFS, unless a test turns xet on

    def child(**env: str) -> subprocess.Popen:
        key = json.dumps(env)
        if key not in started:
            log = (home / f"{len(started)}.log").open("w+")
            more = {**kept, "HF_HOME": str(home / str(len(started))), **env}
            started[key] = subprocess.Popen(
                [sys.executable, "-c", CHILD], env=more, stdin=-1, stdout=-1, stderr=log, text=True
            )
            started[key].log = log
        return started[key]

    yield child
    for one in started.values():
        one.stdin.close()
        one.stdout.close()
        assert one.wait(30) == 0
        one.log.close()


@pytest.fixture
def pushed(children):
    """Push, and say what came of it."""

    def run(path: Path, repo: str = "o/n", env: dict | None = None, **given) -> dict:
        child = children(**(env or {}))
        child.stdin.write(json.dumps({"path": str(path), "repo": repo, "message": "new", **given}) + "\n")
        child.stdin.flush()
        line = child.stdout.readline()
        child.log.seek(0)
        said = {**json.loads(line), "stderr": child.log.read()}
        child.log.truncate(0)
        assert TOKEN not in json.dumps(said)
        return said

    return run


@pytest.fixture
def folder(tmp_path) -> Path:
    """An export: a card, small files, and one with weights, too large and too odd for git."""
    found = tmp_path / "export"
    (found / "unet").mkdir(parents=True)
    (found / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (found / "unet" / "config.json").write_text("{}")
    (found / "unet" / "model.safetensors").write_bytes(os.urandom(300_000))
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("xet", ["0", "1"])
def test_a_folder_arrives_byte_for_byte(hub, pushed, folder, xet):
    wanted = content(folder)
    (folder / ".README.md.17.partial").write_text("half")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("[core]")
    found = pushed(folder, message="unlearned", env={"HF_HUB_DISABLE_XET": "10"[int(xet)]})
    assert found == {"url": f"{hub.url}/o/n/commit/{1:040x}", "stderr": ""}
    kept = hub.repos["o/n"]
    assert kept["files"] == wanted
    assert (kept["private"], kept["messages"]) == (True, ["unlearned"])
    assert hub.asked("/cas/v1/xorbs") == (xet == "1") and hub.asked("/storage/") == (xet == "0")


def test_a_file_arrives_under_its_name(hub, pushed, folder):
    file = folder / "unet" / "model.safetensors"
    found = pushed(file, private=False)
    assert found["url"].startswith(f"{hub.url}/o/n/commit/")
    assert hub.repos["o/n"]["files"] == {"model.safetensors": file.read_bytes()}
    assert hub.repos["o/n"]["private"] is False


def test_what_did_not_change_is_not_committed_again(hub, pushed, folder):
    first = pushed(folder)
    again = pushed(folder)
    assert again["url"] == first["url"]
    assert hub.repos["o/n"]["messages"] == ["new"]
    (folder / "unet" / "config.json").write_text('{"a": 1}')
    assert pushed(folder)["url"] != first["url"]
    assert hub.repos["o/n"]["files"] == content(folder)


def test_a_bare_name_is_in_the_namespace_of_the_token(hub, pushed, folder):
    assert pushed(folder / "README.md", "n")["url"].startswith(f"{hub.url}/me/n/commit/")
    assert list(hub.repos) == ["me/n"]


def test_a_stored_login(hub, pushed, folder, tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    assert "url" in pushed(folder / "README.md", env={"HF_TOKEN": "", "HF_TOKEN_PATH": str(tmp_path / "token")})


def test_private_refuses_a_public_repository(hub, pushed, folder):
    hub.repos["o/n"] = {"private": False, "files": {}, "oids": {}, "messages": []}
    found = pushed(folder)
    assert (found["kind"], found["message"]) == ("CannotRun", "'o/n' is there already, and public")
    assert hub.repos["o/n"]["files"] == {} and not hub.asked("preupload")
    assert "url" in pushed(folder, private=False)
    assert hub.repos["o/n"]["files"] == content(folder)


def test_a_token_that_may_write_but_not_create(hub, pushed, folder):
    hub.repos["o/n"] = {"private": True, "files": {}, "oids": {}, "messages": []}
    hub.refusals["repos/create"] = (403, {}, {"error": "no right to create"})
    assert "url" in pushed(folder)


SAID = 'You don\'t have the rights to create a model under the namespace "o"'


@pytest.mark.parametrize(
    ("status", "where", "body", "said", "hint"),
    [
        (401, "/api/", {"error": "Invalid username or password."}, "401: Invalid username or password.", "HF_TOKEN"),
        (403, "/api/", {"error": SAID}, f"403: {SAID}", "HF_TOKEN"),
        (404, "preupload", {"error": "Repository not found"}, "404: Repository not found", "Check the name"),
        (500, "/commit/", {"error": "Internal\x1b[1m\nerror"}, "500: Internal", "push again"),
        (403, "/storage/", {}, "403: ", "HF_TOKEN"),
        (400, "validate-yaml", {"errors": [{"message": "no licence"}]}, "400: no licence", "push again"),
        (200, "preupload", {"files": "none"}, "improperly formatted", "push again"),
    ],
)  # fmt: skip
def test_a_refusal_is_the_hubs_own_sentence_and_a_way_out(hub, pushed, folder, status, where, body, said, hint):
    hub.refusals[where] = (status, {}, body)
    found = pushed(folder)
    assert (found["kind"], found["code"]) == ("CannotRun", 3)
    assert found["message"].startswith("cannot push to 'o/n': ") and said in found["message"]
    assert hint in found["hint"]
    assert found["message"].isprintable() and len(found["message"]) < 400 and STORAGE not in found["message"]


def test_no_token_says_so(hub, pushed, folder):
    hub.refusals["/api/"] = (401, {}, {"error": "Invalid username or password."})
    found = pushed(folder, env={"HF_TOKEN": ""})
    assert "401" in found["message"] and "hf auth login" in found["hint"]
    assert {auth for _, path, auth in hub.requests if path.startswith("/api/")} == {None}


def test_no_network_says_so(hub, pushed, folder):
    found = pushed(folder, env={"HF_ENDPOINT": "http://someone:passw0rd@127.0.0.1:9"})
    assert (found["kind"], found["code"]) == ("CannotRun", 3) and "passw0rd" not in json.dumps(found)
    assert "HF_ENDPOINT" in found["hint"]


def test_offline_asks_nobody(hub, pushed, folder):
    found = pushed(folder, env={"HF_HUB_OFFLINE": "1"})
    assert (found["kind"], found["message"]) == ("CannotRun", "'o/n' is not pushed: HF_HUB_OFFLINE is set")
    assert not hub.asked("/api/")


def test_an_echoed_token_is_hidden(hub, pushed, folder):
    hub.refusals["repos/create"] = (418, {"X-Error-Message": "I got {auth} from you"}, {"error": f"see ?a={TOKEN}"})
    found = pushed(folder)
    assert HIDDEN in found["message"]
    assert "passw" not in found["traceback"] and "hf_" not in json.dumps(found)


@pytest.mark.parametrize("odd", ["hf_secret\nX-Evil: 1", "hf_sécret", "hf_se cret"])
def test_what_is_no_token_is_not_quoted(hub, pushed, folder, odd):
    hub.refusals["/api/"] = (401, {}, {"error": "no"})
    found = pushed(folder, env={"HF_TOKEN": odd})
    assert found["kind"] == "CannotRun"
    assert odd not in found["traceback"] and repr(odd)[1:-1] not in found["traceback"]


@pytest.mark.parametrize("repo", ["", "o/n/m", "o/", "/n", "o--p/n", "o/n.git", "o/n@main", "öh/n", "../n", "a" * 97])
def test_a_bad_name_is_a_usage_error(folder, repo):
    with pytest.raises(UsageError, match="no name of a repository"):
        push(folder, repo, message="new")


def test_a_token_given_as_the_name_is_hidden(folder):
    with pytest.raises(UsageError) as caught:
        push(folder, f"{TOKEN}/n/m", message="new")
    assert TOKEN not in str(caught.value)


def test_nothing_to_upload_is_a_usage_error(tmp_path):
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    for path in (tmp_path / "none", tmp_path / "empty"):
        with pytest.raises(UsageError, match="nothing to upload"):
            push(path, "o/n", message="new")


def test_the_suite_itself_is_offline_and_progress_bars_come_back(folder):
    before = are_progress_bars_disabled()
    with pytest.raises(CannotRun, match="HF_HUB_OFFLINE is set"):
        push(folder, "o/n", message="new")
    assert are_progress_bars_disabled() == before


@pytest.mark.parametrize(
    "text",
    [
        "Illegal header value b'Bearer pa55/word='", "authorization: bearer pa55/word=",
        "Authorization: Basic pa55", "pa55/word=",
        "GET https://pa55@hub.test/x", "GET https://me:pa55word@hub.test/x", "{'authorization': 'Bearer pa55'}",
        "PUT https://s3.test/key?X-Amz-Signature=pa55&b=1 failed", "token hf_pa55word12", "api_org_pa55word12",
        "eyJhbGciOi.eyJpa55IjoxfQ.pa55-_x", "hf_jwt_pa55word.pa55.pa55",
    ],
)  # fmt: skip
def test_no_secret_is_left(text):
    assert "pa55" not in redacted(text, "pa55/word=")
    assert HIDDEN in redacted(text, "pa55/word=")


def test_what_is_no_secret_is_left():
    text = "409 Client Error at https://hub.test/api/models/o/hf_x (Request ID: Root=1-2): basic transfers?"
    assert redacted(text, "pa55") == text
