"""The page's server: what it sends, what it refuses in a line, and many at once."""

from __future__ import annotations

import json
import re
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from engram_jax.explore import app as module
from tests.explore.explored import CAPACITY, Page

FILES = ("/", "/page.css", "/page.js", "/draw.js", "/icon.svg")


@pytest.mark.parametrize("path", FILES)
def test_every_file_is_guarded_and_asks_for_nothing_outside(page, path):
    answer = page.get(path)
    assert answer.status == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    text = answer.body.decode()
    named = re.findall(r"""(?:href|src|from|fetch\()\s*[=(]?\s*["']([^"']+)["']""", text)
    assert set(named) <= {*FILES, "/explore"} | {name for name in named if name[0] == "#"}
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    if path == "/":  # the policy would block what stands in the page itself
        assert "<script>" not in text and not re.search(r"<style|\sstyle=|\son\w+=", text)


def test_the_page_names_its_parts():
    """Every label, anchor and script refers to something that is there, once."""
    text = (module.resources.files(module.__package__) / "page.html").read_text()
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    referred = re.findall(r'(?:for|href|aria-\w+by)="#?([a-z-]+)"', text)
    assert referred and set(referred) <= set(ids)
    for name in ("page.js", "draw.js"):
        script = (module.resources.files(module.__package__) / name).read_text()
        used = set(re.findall(r'(?:byId|fill)\("([\w-]+)"', script))
        assert used and used <= set(ids)
        assert "innerHTML" not in script and "eval" not in script


def test_an_answer_is_what_the_explorer_says(page, shown):
    answer = page.ask(prompt="the cat", at=0)
    assert answer.status == 200 and answer.headers["content-type"] == "application/json"
    assert answer.json == shown.look("the cat", 0)
    assert page.ask(prompt="the cat", at=None).json == shown.look("the cat")
    assert page.ask(prompt="").json["tokens"] == []


BAD = {
    "no JSON": (b"{", {}, 400, "body: not JSON"),
    "no object": (b"[]", {}, 400, "must be a JSON object"),
    "not UTF-8": (b"\xff", {}, 400, "body: not UTF-8 at byte 0"),
    "no prompt": (b"{}", {}, 400, "prompt = null: must be a text"),
    "a number": (b'{"prompt": 3}', {}, 400, "prompt = 3: must be a text"),
    "a surrogate": (b'{"prompt": "\\ud800"}', {}, 400, "lone surrogate"),
    "another field": (
        b'{"prompt": "a", "promt": 1}',
        {},
        400,
        "'promt': is no known field; there are",
    ),
    "no such token": (b'{"prompt": "a", "at": 1}', {}, 400, "at = 1: must be a token of the text"),
    "no whole number": (b'{"prompt": "a", "at": 0.5}', {}, 400, "at = 0.5: must be a whole number"),
    "negative": (b'{"prompt": "a", "at": -1}', {}, 400, "at = -1: must be a whole number from 0"),
    "long": (json.dumps({"prompt": "b " * 30}).encode(), {}, 400, f"at most {CAPACITY}"),
    "very long": (json.dumps({"prompt": "b" * 2000}).encode(), {}, 400, "prompt: has 2000 bytes"),
    "large": (b" " * 5000, {}, 413, "body: must have at most 4096 bytes"),
    "a form's text": (b'{"prompt": "a"}', {"Content-Type": "text/plain"}, 415, "application/json"),
    "no type": (b'{"prompt": "a"}', {"Content-Type": ""}, 415, "Content-Type = ''"),
    "rebound": (b'{"prompt": "a"}', {"Host": "evil.example"}, 403, "Host = 'evil.example'"),
    "like us": (b'{"prompt": "a"}', {"Host": "localhost.evil.example:1"}, 403, "an address, "),
    "no port": (b'{"prompt": "a"}', {"Host": "localhost:x/@"}, 403, "must be an address"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_one_line(page, name):
    body, headers, status, words = BAD[name]
    answer = page.post(body, **headers)
    assert answer.status == status, answer.body
    assert words in answer.error["message"]


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "127.0.0.1:80", "[::1]:8000", "10.0.0.1"]
)
def test_addresses_and_localhost_are_served(page, host):
    assert page.post(b'{"prompt": ""}', Host=host).status == 200


def test_a_named_host_is_served(shown):
    with Page(shown, host="box.lan") as named:
        assert named.post(b'{"prompt": ""}', Host="BOX.lan:80").status == 200
        assert named.post(b'{"prompt": ""}', Host="other.lan").status == 403


def test_no_host_or_two_are_refused(page):
    for lines in (b"Host: localhost\r\nHost: localhost\r\n", b""):
        sock = page.raw(b"GET / HTTP/1.1\r\n" + lines + b"Connection: close\r\n\r\n")
        assert sock.recv(100).startswith((b"HTTP/1.1 403", b"HTTP/1.1 400"))
        sock.close()


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/explore", 405, "GET /explore: must be POST"),
        ("POST", "/", 405, "POST /: must be "),
        ("GET", "/../pyproject.toml", 404, "no such route"),
        ("GET", "/explorer.py", 404, "GET /explorer.py: no such route; there is GET /"),
        ("GET", "/v1/models", 404, "no such route"),
    ],
)
def test_other_routes(page, method, path, status, words):
    answer = page.send(method, path)
    assert answer.status == status and words in answer.error["message"]


def test_many_at_once_are_answered_as_alone(page, shown):
    prompts = [f"{'the cat ' * (i % 3)}{i}" for i in range(12)]
    expected = [shown.look(prompt) for prompt in prompts]
    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(lambda prompt: page.ask(prompt=prompt), prompts))
    assert [answer.json for answer in answers] == expected


def test_too_many_that_wait_are_told_so(page, monkeypatch):
    monkeypatch.setattr(module, "WAITING", 0)
    answer = page.ask(prompt="a")
    assert answer.status == 429 and answer.headers["retry-after"] == "1"
    assert answer.error["code"] == "queue_full"


def test_an_error_of_ours_is_no_traceback(shown, caplog, monkeypatch):
    def fails(prompt, at):
        raise RuntimeError("a bug")

    with Page(shown) as broken:
        monkeypatch.setattr(shown, "look", fails)
        answer = broken.ask(prompt="a")
    assert answer.status == 500 and "a bug" not in answer.body.decode()
    assert "a bug" in caplog.text


def test_a_page_that_goes_away_leaves_the_others(page):
    body = json.dumps({"prompt": "the cat"}).encode()
    for _ in range(3):
        head = "POST /explore HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        sock = page.raw(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        sock.shutdown(socket.SHUT_RDWR)
        sock.close()
    assert page.ask(prompt="the cat").status == 200
