"""A Hub on the loopback address, with only the API that huggingface_hub and datasets use.

Each commit of a repository is a snapshot of its files. Large files are uploaded over Xet by clients
with hf_xet, and over Git LFS by clients without it. `Hub.faults` makes requests fail.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pyarrow as pa
import yaml

WRITER, READER, BAD = "hf_" + "w" * 34, "hf_" + "r" * 34, "hf_" + "b" * 34
LOCKED = "hf_" + "l" * 34
"""A token without access to any dataset: all are gated for it."""

ORGANIZATION = "org"
LARGE = re.compile(r"\.(npz|ply|mp4|jpg|png|parquet|gz|tgz|tar|zip)$")
DATE = "2025-01-01T00:00:00.000Z"


@dataclass
class Fault:
    """A failure of requests for which the regular expression `where` matches "METHOD /path".

    The first `after` matching requests succeed and the next `times` fail: after `stall` seconds
    they are answered with `status`, or, if that is 0, the connection is cut halfway through the
    request's body. `met` counts the matching requests.
    """

    where: str
    times: int = 1
    after: int = 0
    status: int = 0
    stall: float = 0.0
    met: int = 0


@dataclass
class Repository:
    """refs: the commits of each branch, oldest first; commits: the files of each, by path."""

    private: bool
    refs: dict[str, list[str]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    requests: list[dict] = field(default_factory=list)

    def commit(self, ref, files, message):
        oid = hashlib.sha1(f"{ref} {len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = files
        self.messages.append(message)
        self.refs.setdefault(ref, []).append(oid)
        return oid

    def find(self, revision):
        """The commit that the name of a branch, tag or commit refers to, or None."""
        if revision in self.refs:
            return self.refs[revision][-1]
        return self.tags.get(revision, revision if revision in self.commits else None)

    def files(self, revision="main"):
        return self.commits[self.find(revision)]


class Hub:
    """A running Hub. asked: all requests so far; faults: the failures to apply."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # by SHA-256
        self.xorbs: dict[str, list[bytes]] = {}  # chunks, by the hash of the xorb
        self.asked: list[str] = []
        self.faults: list[Fault] = []
        self.received = 0  # bytes of large files
        self.lock = threading.RLock()
        handler = type("Bound", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def writes(self):
        """The requests that change something."""
        reading = ("preupload", "paths-info", "validate-yaml")
        return [line for line in self.asked if line[:4] != "GET " and line[:5] != "HEAD "
                and not any(word in line for word in reading)]  # fmt: skip

    def fault(self, line):
        with self.lock:
            for fault in self.faults:
                if re.search(fault.where, line):
                    fault.met += 1
                    if fault.after < fault.met <= fault.after + fault.times:
                        return fault
        return None

    def store(self, content):
        digest = hashlib.sha256(content).hexdigest()
        self.objects[digest] = content
        return digest

    def receive_xorb(self, name, body):
        chunks, at = [], 0
        while at < len(body) and body[at : at + 7] != b"XETBLOB":
            packed = int.from_bytes(body[at + 1 : at + 4], "little")
            kind, size = body[at + 4], int.from_bytes(body[at + 5 : at + 8], "little")
            chunks.append(unpack_chunk(kind, body[at + 8 : at + 8 + packed], size))
            at += 8 + packed
        self.xorbs[name] = chunks
        self.received += len(body)

    def receive_shard(self, body):
        """Store the files of a shard: runs of chunks in xorbs, with a SHA-256 to check."""
        at = 48
        while body[at : at + 32] != b"\xff" * 32:
            flags, runs = struct.unpack_from("<II", body, at + 32)
            at += 48
            content = b""
            for _ in range(runs):
                _, _, start, end = struct.unpack_from("<IIII", body, at + 32)
                content += b"".join(self.xorbs[xet_name(body[at : at + 32])][start:end])
                at += 48
            at += 48 * runs if flags & 1 << 31 else 0
            digest = self.store(content)
            if flags & 1 << 30:
                assert digest == xet_name(body[at : at + 32])
                at += 48


def xet_name(raw):
    """A hash in Xet's notation: four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


def unpack_chunk(kind, packed, size):
    """Decompress a chunk. kind 0: none, 1: LZ4, else LZ4 of bytes grouped by index mod 4."""
    if kind == 0:
        return packed
    plain = pa.decompress(packed, decompressed_size=size, codec="lz4", asbytes=True)
    if kind == 1:
        return plain
    grouped, whole, at = np.frombuffer(plain, np.uint8), np.empty(size, np.uint8), 0
    for place in range(4):
        count = len(whole[place::4])
        whole[place::4] = grouped[at : at + count]
        at += count
    return whole.tobytes()


class CutError(Exception):
    """Close the connection without an answer."""


class RefusedError(Exception):
    """An error answer: a status, the Hub's error code and message."""

    def __init__(self, status, code="", words=""):
        self.status, self.code, self.words = status, code, words


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        """Print nothing."""

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (ConnectionError, CutError):
            self.close_connection = True

    def do_GET(self):
        address = urlsplit(self.path)
        self.place, self.query = address.path, parse_qs(address.query)
        line = f"{self.command} {unquote(self.place)}"
        self.hub.asked.append(line)
        fault = self.hub.fault(line)
        try:
            if fault:
                self.fail(fault)
            self.body = self.read_body()
            self.route()
        except RefusedError as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.words}
            self.answer({"error": refused.words}, refused.status, headers)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815  # http.server's own names

    def fail(self, fault):
        size = int(self.headers.get("Content-Length") or 0)
        if fault.status:
            self.read_body()
            time.sleep(fault.stall)
            raise RefusedError(fault.status, "", "something is wrong here")
        self.rfile.read(size // 2)
        time.sleep(fault.stall)
        raise CutError

    def read_body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, content, status=200, headers=None):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json", **(headers or {})}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # Tokens and routes

    @property
    def token(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def check_token(self, *, writing):
        if self.token not in (None, WRITER, READER, LOCKED):
            raise RefusedError(401, "", "Invalid credentials in Authorization header")
        if writing and self.token is None:
            raise RefusedError(401, "", "Invalid username or password.")
        if writing and self.token == READER:
            raise RefusedError(403, "", "you must use a write token to upload to a repository")

    def repository(self, *, writing=False):
        self.check_token(writing=writing)
        found = self.hub.repositories.get(self.repo_id)
        if found is None or (found.private and self.token is None):
            raise RefusedError(404 if self.token else 401, "RepoNotFound", "Repository not found")
        return found

    def commit_of(self, repository, revision):
        oid = repository.find(revision)
        if oid is None:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid

    ROUTES = (
        (r"/api/whoami-v2", "whoami"),
        (r"/api/validate-yaml", "validate_yaml"),
        (r"/api/repos/create", "create"),
        (r"/xet/v1/xorbs/default/(\w+)", "xorb"),
        (r"/xet/v1/chunks/.*", "chunk"),
        (r"/xet/(?:v1/)?shards", "shard"),
        (r"/lfs/(\w+)", "lfs_object"),
        (r"/datasets/(\w+/[\w.-]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        (r"/datasets/(\w+/[\w.-]+)/resolve/(refs/\w+/\w+|[^/]+)/(.+)", "resolve"),
        (r"/api/datasets/(\w+/[\w.-]+)", "info"),
        (r"/api/datasets/(\w+/[\w.-]+)/revision/(.+)", "info"),
        (r"/api/datasets/(\w+/[\w.-]+)/xet-write-token/(.+)", "xet_token"),
        (r"/api/datasets/(\w+/[\w.-]+)/preupload/(.+)", "preupload"),
        (r"/api/datasets/(\w+/[\w.-]+)/commit/(.+)", "commit"),
        (r"/api/datasets/(\w+/[\w.-]+)/auth-check", "auth_check"),
        (r"/api/datasets/(\w+/[\w.-]+)/refs", "list_refs"),
        (r"/api/datasets/(\w+/[\w.-]+)/branch/(.+)", "branch"),
        (r"/api/datasets/(\w+/[\w.-]+)/tag/(.+)", "tag"),
        (r"/api/datasets/(\w+/[\w.-]+)/discussions", "discussions"),
        (r"/api/datasets/(\w+/[\w.-]+)/discussions/(\d+)", "discussion"),
        (r"/api/datasets/(\w+/[\w.-]+)/paths-info/(.+)", "paths_info"),
        (r"/api/datasets/(\w+/[\w.-]+)/tree/(refs/\w+/\w+|[^/]+)/?(.*)", "tree"),
    )

    def route(self):
        for pattern, name in self.ROUTES:
            if match := re.fullmatch(pattern, self.place):
                found = tuple(map(unquote, match.groups()))
                if found and "/" in found[0]:
                    self.repo_id, *found = found
                with self.hub.lock:
                    getattr(self, name)(*found)
                return
        raise RefusedError(404, "", f"no such place: {self.command} {self.place}")

    # Repositories

    def whoami(self):
        self.check_token(writing=False)
        if self.token is None:
            raise RefusedError(401, "", "Invalid username or password.")
        self.answer({"type": "user", "name": "me", "orgs": [{"name": ORGANIZATION}]})

    def validate_yaml(self):
        matter = json.loads(self.body)["content"].split("---\n")[1]
        try:
            yaml.safe_load(matter)
        except yaml.YAMLError:
            self.answer({"errors": [{"message": "bad indentation"}], "warnings": []}, 400)
        else:
            self.answer({"errors": [], "warnings": []})

    def create(self):
        self.check_token(writing=True)
        wanted = json.loads(self.body)
        repo_id = f"{wanted['organization'] or 'me'}/{wanted['name']}"
        if wanted["organization"] not in (None, "me", ORGANIZATION):
            words = f"You don't have the rights to create a dataset under {wanted['organization']}"
            raise RefusedError(403, "", words)
        if repo_id in self.hub.repositories:
            self.answer({"url": f"{self.hub.url}/datasets/{repo_id}"}, 409)
            return
        assert wanted["type"] == "dataset"
        made = Repository(wanted.get("visibility") == "private")
        made.commit("main", {".gitattributes": b"*.npz filter=lfs\n"}, "initial commit")
        self.hub.repositories[repo_id] = made
        self.answer({"url": f"{self.hub.url}/datasets/{repo_id}"})

    def info(self, revision="main"):
        repository = self.repository()
        oid = self.commit_of(repository, revision)
        card = repository.commits[oid].get("README.md", b"").decode().split("---\n")
        siblings = [{"rfilename": path} for path in repository.commits[oid]]
        self.answer(
            {
                "id": self.repo_id,
                "sha": oid,
                "private": repository.private,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "lastModified": DATE,
                "siblings": siblings,
                "cardData": yaml.safe_load(card[1]) if len(card) > 2 else None,
            }
        )

    def auth_check(self):
        """Check access to the files. Listing a gated dataset needs no access."""
        self.repository()
        self.check_access()
        self.answer({})

    def check_access(self):
        if self.token == LOCKED:
            words = f"Access to dataset {self.repo_id} is restricted"
            raise RefusedError(403, "GatedRepo", words)

    def list_refs(self):
        repository = self.repository()
        branches = {name: oids[-1] for name, oids in repository.refs.items()}
        self.answer(
            {
                kind: [
                    {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid}
                    for name, oid in refs.items()
                    if not name.startswith("refs/")
                ]
                for kind, refs in (("branches", branches), ("tags", repository.tags))
            }
            | {"converts": []}
        )

    def branch(self, name):
        repository = self.repository(writing=True)
        if name in repository.refs:
            raise RefusedError(409, "", "Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repository.refs[name] = [self.commit_of(repository, start)]
        self.answer({})

    def tag(self, name):
        repository = self.repository(writing=True)
        if self.command == "DELETE":
            if repository.tags.pop(name, None) is None:
                raise RefusedError(404, "RevisionNotFound", "Tag not found")
        else:
            wanted = json.loads(self.body)["tag"]
            if wanted in repository.tags:
                raise RefusedError(409, "", "Tag reference exists already")
            repository.tags[wanted] = self.commit_of(repository, name)
        self.answer({})

    def discussions(self):
        repository = self.repository(writing=self.command == "POST")
        if self.command == "GET":
            found = repository.requests if self.query.get("p", ["0"]) == ["0"] else []
            self.answer({"discussions": found, "count": len(repository.requests), "start": 0})
            return
        number = len(repository.requests) + 1
        repository.refs[f"refs/pr/{number}"] = list(repository.refs["main"])
        repository.requests.append(
            {
                "num": number,
                "title": json.loads(self.body)["title"],
                "status": "draft",
                "isPullRequest": True,
                "author": {"name": "me"},
                "createdAt": DATE,
                "repo": {"name": self.repo_id, "type": "dataset"},
            }
        )
        self.answer({"num": number})

    def discussion(self, number):
        request = self.repository().requests[int(number) - 1]
        more = {"events": [], "changes": {"base": "refs/heads/main"}, "filesWithConflicts": []}
        self.answer(request | more)

    # Uploading

    def preupload(self, revision):
        repository = self.repository(writing=True)
        held = repository.commits[self.commit_of(repository, revision)]
        files = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            large = bool(LARGE.search(path))
            there = {"oid": oid(held[path], large)} if path in held else {}
            mode = "lfs" if large else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **there})
        self.answer({"files": files})

    def xet_token(self, _):
        self.repository(writing=True)
        expires, url = str(int(time.time()) + 3600), f"{self.hub.url}/xet"
        headers = {
            "X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": expires,
        }  # fmt: skip
        self.answer({"casUrl": url, "accessToken": "xet", "exp": int(expires)}, headers=headers)

    def xorb(self, name):
        new = name not in self.hub.xorbs
        self.hub.receive_xorb(name, self.body)
        self.answer({"was_inserted": new})

    def chunk(self):
        raise RefusedError(404)

    def shard(self):
        self.hub.receive_shard(self.body)
        self.answer({"result": 1})

    def lfs_batch(self):
        self.repository(writing=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
            there = {} if wanted["oid"] in self.hub.objects else {"actions": upload}
            objects.append(wanted | there)
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_object(self, digest):
        assert self.hub.store(self.body) == digest
        self.hub.received += len(self.body)
        self.answer(b"")

    def commit(self, revision):
        repository = self.repository(writing=True)
        if revision not in repository.refs:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = dict(repository.files(revision))
        message, sent = "", json.loads(self.body.splitlines()[0])["value"]
        if sent.get("parentCommit", repository.find(revision)) != repository.find(revision):
            raise RefusedError(412, "", "A commit has happened since.")
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        made = repository.commit(revision, files, message)
        url = f"{self.hub.url}/datasets/{self.repo_id}/commit/{made}"
        self.answer({"success": True, "commitOid": made, "commitUrl": url})

    # Downloading

    def entry(self, path, content):
        large = bool(LARGE.search(path))
        lfs = {"oid": oid(content, True), "size": len(content), "pointerSize": 130}
        found = {"type": "file", "path": path, "size": len(content), "oid": oid(content, False)}
        return found | ({"lfs": lfs} if large else {})

    def entries(self, files, recursive, below=""):
        prefix = f"{below}/" if below else ""
        folders = {}
        for path, content in sorted(files.items()):
            if not path.startswith(prefix):
                continue
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                folder = prefix + "/".join(parts[:depth])
                folders[folder] = {"type": "directory", "path": folder, "size": 0, "oid": "0" * 40}
            if recursive or len(parts) == 1:
                yield self.entry(path, content)
        yield from folders.values()

    def tree(self, revision, below=""):
        repository = self.repository()
        files = repository.commits[self.commit_of(repository, revision)]
        recursive = self.query.get("recursive", [""])[0].lower() in ("1", "true")
        found = list(self.entries(files, recursive, below.rstrip("/")))
        if below and not found:
            raise RefusedError(404, "EntryNotFound", f"{below} does not exist")
        self.answer(found)

    def paths_info(self, revision):
        repository = self.repository()
        files = repository.commits[self.commit_of(repository, revision)]
        asked = self.body
        form = asked[:1] != b"{"
        paths = parse_qs(asked.decode())["paths"] if form else json.loads(asked)["paths"]
        every = {entry["path"]: entry for entry in self.entries(files, True)}
        self.answer([every[path] for path in paths if path in every])

    def resolve(self, revision, path):
        repository = self.repository()
        self.check_access()
        made = self.commit_of(repository, revision)
        content = repository.commits[made].get(path)
        if content is None:
            raise RefusedError(404, "EntryNotFound", "Entry not found")
        large = bool(LARGE.search(path))
        headers = {"ETag": f'"{oid(content, large)}"', "X-Repo-Commit": made}
        headers |= {"Accept-Ranges": "bytes", "X-Linked-Size": str(len(content))}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(asked[1]), int(asked[2] or len(content) - 1)
            span = f"bytes {start}-{min(end, len(content) - 1)}/{len(content)}"
            self.answer(content[start : end + 1], 206, headers | {"Content-Range": span})
        else:
            self.answer(content, 200, headers)


def oid(content, large):
    """The hash that names a file's content: SHA-256 if it is large, else Git's blob hash."""
    if large:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
