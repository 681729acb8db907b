"""
A small Hugging Face Hub on loopback, for tests that push and pull through huggingface_hub's own HTTP client.

It implements the calls of huggingface_hub 2.x for models: create, preupload, LFS batch / upload / verify, commit, info, tree,
paths-info, refs, branches, tags and `resolve` (HEAD with ETag, X-Repo-Commit, X-Linked-*; LFS files by redirect to a
second origin, as on the real Hub, so that a client which sends its token to the storage is caught). Everything is kept
in memory: blobs by SHA-256, commits with their parents. The Xet protocol is not supported: run the client with
`HF_HUB_DISABLE_XET=1`.

    with HubServer(tokens={"hf_alice": "alice"}) as hub:
        HfApi(endpoint=hub.endpoint, token="hf_alice").create_repo("alice/model")
"""

import base64
import fnmatch
import hashlib
import json
import re
import secrets
import threading
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


LFS_PATTERNS = ["*.bin", "*.bin.*", "*.ckpt", "*.h5", "*.npz", "*.onnx", "*.parquet", "*.pkl", "*.pt", "*.pth"]
LFS_PATTERNS += ["*.safetensors", "*.zip", "*tfevents*", "*.png"]
GIT_ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()
REGULAR_FILE_LIMIT = 10 * 2**20  # bytes; a larger file goes to LFS whatever its name


class HubError(Exception):
    """An HTTP error in the Hub's dialect: huggingface_hub maps `code` (X-Error-Code) to its exception classes."""

    def __init__(self, status, message, code=None, commit=None):
        super().__init__(message)
        self.status, self.message, self.code, self.commit = status, message, code, commit


class ConnectionCut(Exception):
    """Raised to close the client's connection without an answer."""


@dataclass
class Commit:
    oid: str
    parent: str | None
    title: str
    files: dict  # path in the repository → SHA-256 of its content
    lfs: set  # the paths that are stored through LFS
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z"))


@dataclass
class Repo:
    owner: str
    private: bool
    commits: dict = field(default_factory=dict)  # oid → Commit
    branches: dict = field(default_factory=dict)  # name → oid
    tags: dict = field(default_factory=dict)

    def commit(self, revision):
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        return self.commits[oid]

    def add(self, branch, title, files, lfs):
        parent = self.branches.get(branch)
        oid = hashlib.sha1(
            json.dumps([parent, title, sorted(files.items()), secrets.token_hex(8)]).encode()
        ).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, files, lfs)
        self.branches[branch] = oid
        return oid


class HubServer:
    """
    Args:
        tokens (`dict[str, str]`): access token → user name. A user writes below the own name only.

    Attributes:
        endpoint (`str`): for `HF_ENDPOINT`.
        requests (`list[tuple[str, str, int]]`): (method, path, status) of each answered request; 0 where it was cut.
        uploaded (`Counter`): SHA-256 → number of times its content was stored (2: sent again without need).
        leaked (`list[str]`): paths of storage requests that carried an Authorization header.
    """

    def __init__(self, tokens):
        self.tokens = dict(tokens)
        self.repos, self.blobs, self.uploads = {}, {}, {}
        self.requests, self.uploaded, self.leaked = [], Counter(), []
        self._faults = []
        self._lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.storage = f"http://localhost:{self.port}"  # another origin for the client: its token must stay behind

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def fail_next(self, method, pattern, times=1, status=None):
        """
        Let the next `times` requests that match fail: with the HTTP `status`, or (`status=None`) with the connection cut
        in the middle of the body, of the request or, where it has none, of the answer.
        """
        self._faults.append([method, re.compile(pattern), times, status])

    def take_fault(self, method, path):
        with self._lock:
            for fault in self._faults:
                if fault[0] == method and fault[1].search(path) and fault[2] > 0:
                    fault[2] -= 1
                    return fault
        return None

    def count(self, method, pattern):
        return sum(m == method and re.search(pattern, path) is not None for m, path, _ in self.requests)

    def files(self, repo_id, revision="main"):
        """Path → content (`bytes`) at a revision."""
        return {path: self.blobs[sha] for path, sha in self.repos[repo_id].commit(revision).files.items()}

    def every_byte(self):
        """All bytes that were ever uploaded, committed or not; a test searches them for secrets."""
        return b"\0".join(self.blobs.values())

    def store(self, content):
        sha = hashlib.sha256(content).hexdigest()
        self.blobs[sha] = content
        self.uploaded[sha] += 1
        return sha

    # Access ------------------------------------------------------------------------------------------------------

    def user(self, authorization):
        if authorization is None:
            return None
        user = self.tokens.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def repo(self, repo_id, user, write=False):
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and user != repo.owner):  # a private repository looks like a missing one
            if user is None:
                raise HubError(401, "Invalid username or password.", code="RepoNotFound")
            raise HubError(404, "Repository not found", code="RepoNotFound")
        if write and user != repo.owner:
            raise HubError(401 if user is None else 403, "You don't have the rights to write to this repository")
        return repo

    # API: each takes (user, the groups of its path, the query, the body) and gives a JSON answer -------------------

    def whoami(self, user, query, body):
        if user is None:
            raise HubError(401, "Invalid username or password.")
        return {"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def validate_yaml(self, user, query, body):
        match = re.match(r"\s*---\r?\n(.*?)\r?\n---", json.loads(body)["content"], re.DOTALL)
        try:
            metadata = yaml.safe_load(match.group(1)) if match else None
        except yaml.YAMLError as error:
            raise HubError(400, "bad YAML") from error
        return {"errors": [], "warnings": [] if metadata else [{"message": "empty or missing yaml metadata"}]}

    def create(self, user, query, body):
        payload = json.loads(body)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        owner = payload.get("organization") or user
        if owner != user:
            raise HubError(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        repo_id = f"{owner}/{payload['name']}"
        answer = {"url": f"{self.endpoint}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.repos:
            raise HubError(409, json.dumps({**answer, "error": "You already created this model repo"}))
        private = payload.get("visibility") == "private" or bool(payload.get("private"))
        repo = self.repos[repo_id] = Repo(owner, private)
        repo.add("main", "initial commit", {".gitattributes": self.store(GIT_ATTRIBUTES)}, set())
        return answer

    def preupload(self, user, repo_id, revision, query, body):
        commit = self.repo(repo_id, user, write=True).commit(revision)
        attributes = self.blobs.get(commit.files.get(".gitattributes"), b"").decode()
        patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
        answer = []
        for file in json.loads(body)["files"]:
            path, name = file["path"], file["path"].rsplit("/", 1)[-1]
            lfs = file["size"] > REGULAR_FILE_LIMIT or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
            known = commit.files.get(path)
            oid = known if lfs or known is None else git_oid(self.blobs[known])
            entry = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            answer.append(entry | ({"oid": oid} if oid else {}))
        return {"files": answer}

    def lfs_batch(self, user, repo_id, query, body):
        self.repo(repo_id, user, write=True)
        objects = []
        for item in json.loads(body)["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.blobs:
                signature = secrets.token_hex(16)  # stands for a signed URL: whoever has it may upload, once it fits
                self.uploads[signature] = item["oid"], item["size"]
                entry["actions"] = {
                    "upload": {"href": f"{self.storage}/storage/{item['oid']}?signature={signature}"},
                    "verify": {"href": f"{self.endpoint}/{repo_id}.git/info/lfs/objects/verify"},
                }
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, user, oid, query, body):
        expected = self.uploads.get(query.get("signature", [""])[0])
        if expected != (oid, len(body)) or hashlib.sha256(body).hexdigest() != oid:
            raise HubError(400, "The content does not have the announced size and SHA-256")
        self.store(body)
        return {}

    def lfs_verify(self, user, repo_id, query, body):
        self.repo(repo_id, user, write=True)
        item = json.loads(body)
        if len(self.blobs.get(item["oid"], b"")) != item["size"]:
            raise HubError(422, "The object was not uploaded")
        return {}

    def commit(self, user, repo_id, revision, query, body):
        repo = self.repo(repo_id, user, write=True)
        if revision not in repo.branches:
            raise HubError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        head = repo.commit(revision)
        files, lfs, title = dict(head.files), set(head.lfs), "commit"
        for line in body.decode().splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, head.oid):
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = self.store(base64.b64decode(value["content"]))
                lfs.discard(value["path"])
            elif key == "lfsFile":
                if value["oid"] not in self.blobs:
                    raise HubError(400, f"LFS object {value['oid']} of {value['path']} was not uploaded")
                files[value["path"]] = value["oid"]
                lfs.add(value["path"])
            elif key in ("deletedFile", "deletedFolder"):
                gone = [p for p in files if p == value["path"] or p.startswith(value["path"].rstrip("/") + "/")]
                if not gone:
                    raise HubError(404, "A file with this name doesn't exist", code="EntryNotFound")
                for path in gone:
                    del files[path]
                    lfs.discard(path)
        oid = repo.add(revision, title, files, lfs)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.endpoint}/{repo_id}/commit/{oid}"}

    def info(self, user, repo_id, revision, query, body):
        repo = self.repo(repo_id, user)
        commit = repo.commit(revision or "main")
        answer = {"_id": repo_id, "id": repo_id, "modelId": repo_id, "author": repo.owner, "sha": commit.oid}
        answer |= {"lastModified": commit.date, "private": repo.private, "gated": False, "disabled": False}
        answer |= {"tags": [], "downloads": 0, "likes": 0}
        return answer | {"siblings": [{"rfilename": path} for path in sorted(commit.files)]}

    def _entry(self, commit, path):
        content, sha = self.blobs[commit.files[path]], commit.files[path]
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
        if path in commit.lfs:
            entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 134}
        return entry

    def tree(self, user, repo_id, revision, folder, query, body):
        commit = self.repo(repo_id, user).commit(revision)
        prefix = f"{folder}/" if folder else ""
        paths = sorted(path for path in commit.files if path.startswith(prefix))
        if prefix and not paths:
            raise HubError(404, f"{folder} does not exist on {revision!r}", code="EntryNotFound", commit=commit.oid)
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        folders = {prefix + path[len(prefix) :].rsplit("/", 1)[0] for path in paths if "/" in path[len(prefix) :]}
        if not recursive:
            folders = {prefix + folder[len(prefix) :].split("/")[0] for folder in folders}
            paths = [path for path in paths if "/" not in path[len(prefix) :]]
        entries = [
            {"type": "directory", "path": f, "oid": hashlib.sha1(f.encode()).hexdigest()} for f in sorted(folders)
        ]
        return entries + [self._entry(commit, path) for path in paths]

    def paths_info(self, user, repo_id, revision, query, body):
        commit = self.repo(repo_id, user).commit(revision)
        wanted = parse_qs(body.decode()).get("paths", [])
        return [self._entry(commit, path) for path in wanted if path in commit.files]

    def refs(self, user, repo_id, query, body):
        repo = self.repo(repo_id, user)

        def listing(kind, names):
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": oid} for n, oid in names.items()]

        return {"branches": listing("heads", repo.branches), "tags": listing("tags", repo.tags), "converts": []}

    def history(self, user, repo_id, revision, query, body):
        repo = self.repo(repo_id, user)
        commit, answer = repo.commit(revision), []
        while commit is not None:
            entry = {"id": commit.oid, "title": commit.title, "message": "", "date": commit.date}
            answer.append(entry | {"authors": [{"user": repo.owner}]})
            commit = repo.commits.get(commit.parent)
        return answer

    def branch(self, user, repo_id, name, query, body):
        repo = self.repo(repo_id, user, write=True)
        if name in repo.branches:
            raise HubError(409, "Reference already exists")
        repo.branches[name] = repo.commit(json.loads(body or b"{}").get("startingPoint") or "main").oid
        return {}

    def tag(self, user, repo_id, revision, query, body):
        repo, name = self.repo(repo_id, user, write=True), json.loads(body)["tag"]
        if name in repo.tags:
            raise HubError(409, "Tag already exists")
        repo.tags[name] = repo.commit(revision).oid
        return {}


def git_oid(content):
    """The SHA-1 by which git names a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_REPO = r"([^/]+/[^/]+?)"
_ROUTES = [
    ("GET", r"/api/whoami-v2", HubServer.whoami),
    ("POST", r"/api/validate-yaml", HubServer.validate_yaml),
    ("POST", r"/api/repos/create", HubServer.create),
    ("POST", rf"/api/models/{_REPO}/preupload/([^/]+)", HubServer.preupload),
    ("POST", rf"/api/models/{_REPO}/commit/([^/]+)", HubServer.commit),
    ("POST", rf"/api/models/{_REPO}/paths-info/([^/]+)", HubServer.paths_info),
    ("POST", rf"/api/models/{_REPO}/branch/([^/]+)", HubServer.branch),
    ("POST", rf"/api/models/{_REPO}/tag/([^/]+)", HubServer.tag),
    ("GET", rf"/api/models/{_REPO}/tree/([^/]+)(?:/(.+))?", HubServer.tree),
    ("GET", rf"/api/models/{_REPO}/refs", HubServer.refs),
    ("GET", rf"/api/models/{_REPO}/commits/([^/]+)", HubServer.history),
    ("GET", rf"/api/models/{_REPO}(?:/revision/([^/]+))?", HubServer.info),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", HubServer.lfs_batch),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/verify", HubServer.lfs_verify),
    ("PUT", r"/storage/([0-9a-f]{64})", HubServer.lfs_upload),
]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub = None

    def log_message(self, *_):
        pass  # the requests are kept in `HubServer.requests`

    def _body(self, cut):
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            if cut:
                self.rfile.readline()
                raise ConnectionCut
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        length = int(self.headers.get("Content-Length") or 0)
        if cut and length:
            self.rfile.read(length // 2)
            raise ConnectionCut
        return self.rfile.read(length)

    def _send(self, status, content, headers, cut):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True

    def _dispatch(self):
        url = urlsplit(self.path)
        status = 0
        try:
            fault = self.hub.take_fault(self.command, url.path)
            cut = fault is not None and fault[3] is None
            body = self._body(cut)
            if fault is not None and not cut:
                raise HubError(fault[3], "injected fault")
            status, content, headers = self._answer(url, body)
        except ConnectionCut:
            self.close_connection = True
            return
        except HubError as error:
            status = error.status
            content = (
                error.message.encode()
                if error.message.startswith("{")
                else json.dumps({"error": error.message}).encode()
            )
            headers = {"Content-Type": "application/json", "X-Error-Message": error.message}
            headers |= {"X-Error-Code": error.code} if error.code else {}
            headers |= {"X-Repo-Commit": error.commit} if error.commit else {}
        finally:
            self.hub.requests.append((self.command, unquote(url.path), status))
        self._send(status, content, headers, cut)

    def _answer(self, url, body):
        hub, authorization = self.hub, self.headers.get("Authorization")
        if url.path.startswith("/storage/"):
            if authorization is not None:
                hub.leaked.append(url.path)
            user = None
        else:
            user = hub.user(authorization)
        for method, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, url.path)
            if match is not None and method == self.command:
                groups = [unquote(group) if group is not None else None for group in match.groups()]
                with hub._lock:
                    answer = action(hub, user, *groups, query=parse_qs(url.query), body=body)
                return 200, json.dumps(answer).encode(), {"Content-Type": "application/json"}
        if self.command in ("GET", "HEAD"):
            match = re.fullmatch(rf"/{_REPO}/resolve/([^/]+)/(.+)", url.path)
            if match is not None:
                return self._resolve(user, *map(unquote, match.groups()))
            match = re.fullmatch(r"/storage/([0-9a-f]{64})", url.path)
            if match is not None and match.group(1) in hub.blobs:
                return self._file(hub.blobs[match.group(1)], {"ETag": f'"{match.group(1)}"'})
        raise HubError(404, "Not found")

    def _resolve(self, user, repo_id, revision, path):
        commit = self.hub.repo(repo_id, user).commit(revision)
        if path not in commit.files:
            raise HubError(404, "Entry not found", code="EntryNotFound", commit=commit.oid)
        sha = commit.files[path]
        content = self.hub.blobs[sha]
        if path not in commit.lfs:
            return self._file(content, {"X-Repo-Commit": commit.oid, "ETag": f'"{git_oid(content)}"'})
        linked = {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(content)), "X-Repo-Commit": commit.oid}
        return 302, b"", {"Location": f"{self.hub.storage}/storage/{sha}", "ETag": f'"{sha}"', **linked}

    def _file(self, content, headers):
        headers = {"Accept-Ranges": "bytes", **headers}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            return 200, content, headers
        first, last = int(match.group(1)), min(int(match.group(2) or len(content) - 1), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return 206, content[first : last + 1], headers

    do_GET = do_HEAD = do_POST = do_PUT = _dispatch
