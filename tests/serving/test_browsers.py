"""Which web pages a server lets in, and how they say who they are."""

from __future__ import annotations

import base64

import httpx
import pytest
from websockets.exceptions import InvalidStatus

from cipherlm.cli import main
from cipherlm.serving.browsers import origin_argument
from cipherlm.serving.page import Page

KNOWN, STRANGE = "https://chat.example.org", "https://evil.example"
FOREIGN = [
    STRANGE,
    "null",
    "*",
    "",
    "http://chat.example.org",
    "https://chat.example.org:444",
    "https://chat.example.org.evil.example",
    "https://chat.example.org/",
    "https://evil.example#https://chat.example.org",
    "HTTPS://chat.example.org",
]
PAGE = Page({"index.html": b"<p>hello</p>", "page.json": b"{}"}, "default-src 'none'")


def token_protocol(token: str) -> str:
    return "cipherlm.token." + base64.urlsafe_b64encode(token.encode()).decode().rstrip("=")


@pytest.mark.parametrize("options", [{}, {"origins": [KNOWN]}, {"page": PAGE}], ids=["none", "known", "page"])
def test_no_other_page_is_let_in(start, options):
    with start(**options) as harness, harness.http() as http:
        for origin in FOREIGN:
            for method, path in (("GET", "/v1/model"), ("POST", "/v1/keys"), ("OPTIONS", "/v1/keys")):
                asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
                answer = http.request(method, path, headers=asked)
                assert answer.status_code == 403, origin
                assert not any(name.startswith("access-control") for name in answer.headers)
            with pytest.raises(InvalidStatus) as refused, harness.socket(origin=origin):
                pass
            assert refused.value.response.status_code == 403, origin


@pytest.fixture
def socket_options():
    return {"origin": KNOWN, "subprotocols": ["cipherlm.1"]}


def test_a_page_that_is_known_is_let_in(start, socket_options):
    with start(origins=[KNOWN]) as harness, harness.http() as http:
        answer = http.get("/v1/model", headers={"Origin": KNOWN})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == KNOWN
        assert answer.headers["vary"] == "Origin"
        assert "access-control-allow-credentials" not in answer.headers
        refused = http.post("/v1/keys", headers={"Origin": KNOWN}, content=b"nonsense")
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (400, KNOWN)
        asked = {"Origin": KNOWN, "Access-Control-Request-Method": "PATCH"}
        preflight = http.options("/v1/keys/abc", headers=asked)
        assert preflight.status_code == 204
        assert "PATCH" in preflight.headers["access-control-allow-methods"]
        assert "Upload-Checksum" in preflight.headers["access-control-allow-headers"]
        keys = harness.keys()
        with harness.socket(**socket_options) as client:
            assert client.socket.subprotocol == "cipherlm.1"
            assert client.open(keys)["type"] == "opened"


def test_other_clients_see_nothing_of_it(start):
    with start(origins=[KNOWN]) as harness, harness.http() as http:
        answer = http.get("/v1/model")
        assert answer.status_code == 200
        assert not any(name.startswith("access-control") for name in answer.headers)
        assert http.options("/v1/model").status_code == 405
        harness.serves()


def test_two_origins_are_none(start):
    with start(origins=[KNOWN]) as harness:
        answer = httpx.get(harness.url + "/v1/model", headers=[("Origin", KNOWN), ("Origin", STRANGE)])
        assert answer.status_code == 403


def test_a_page_says_its_token_in_a_subprotocol(start, logged):
    tokens = [("a", "token-a"), ("b", "t\"o,k'e/n+b~")]
    with start(origins=[KNOWN], tokens=tokens) as harness:
        for _, token in tokens:
            keys = harness.keys(token=token)
            offered = ["cipherlm.1", token_protocol(token)]
            with harness.socket(origin=KNOWN, subprotocols=offered) as client:
                assert client.socket.subprotocol == "cipherlm.1"  # and not the token
                assert client.open(keys)["type"] == "opened"
        for offered in (
            ["cipherlm.1"],
            [token_protocol("wrong")],
            ["cipherlm.token.%"],
            ["cipherlm.token.AA"],
        ):
            with pytest.raises(InvalidStatus) as refused, harness.socket(origin=KNOWN, subprotocols=offered):
                pass
            assert refused.value.response.status_code == 401
    assert "token-a" not in logged.getvalue()
    assert token_protocol("token-a") not in logged.getvalue()


def test_a_server_with_a_page_lets_in_its_own_and_serves_it(start):
    with start(page=PAGE) as harness, harness.http() as http:
        for path in ("/", "/index.html"):
            answer = http.get(path)
            assert (answer.status_code, answer.text) == (200, "<p>hello</p>")
            assert answer.headers["content-type"] == "text/html; charset=utf-8"
            assert answer.headers["content-security-policy"] == "default-src 'none'"
            assert answer.headers["x-content-type-options"] == "nosniff"
        assert http.get("/other").status_code == 404
        own = {"Origin": harness.url}
        assert http.get("/v1/model", headers=own).status_code == 200
        assert http.post("/v1/keys", headers=own).status_code == 400
        # The same page under another name of this machine, or on another port.
        port = harness.url.rpartition(":")[2]
        for origin in (
            f"http://localhost:{port}",
            "http://127.0.0.1:1",
            harness.url.replace("http", "https"),
        ):
            assert http.get("/v1/model", headers={"Origin": origin}).status_code == 403
        keys = harness.keys()
        with harness.socket(origin=harness.url) as client:
            assert client.open(keys)["type"] == "opened"


def test_a_rebound_name_is_no_own_page(start):
    with start(page=PAGE) as harness:
        port = harness.url.rpartition(":")[2]
        host = f"evil.example:{port}"
        answer = httpx.get(harness.url, headers={"Host": host, "Origin": f"http://{host}"})
        assert answer.status_code == 403


@pytest.mark.parametrize(
    ("given", "origin"),
    [
        ("https://chat.example.org", "https://chat.example.org"),
        ("HTTPS://Chat.Example.org:443/", "https://chat.example.org"),
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://[::1]:80", "http://[::1]"),
    ],
)
def test_origins_are_read_as_browsers_write_them(given, origin):
    assert origin_argument(given) == origin


@pytest.mark.parametrize(
    "given", ["*", "null", "", "chat.example.org", "https://chat.example.org/page", "ftp://a", "https://a:b"]
)
def test_what_is_no_origin_is_refused(given, capsys, tmp_path):
    with pytest.raises(ValueError, match="not the origin of a web page"):
        origin_argument(given)
    assert main(["serve", str(tmp_path), "--allow-origin", given]) == 2
    assert "not the origin of a web page" in capsys.readouterr().err
