"""Who is answered by the server, and what: token, hosts, paths, hostile names, two windows, identify."""

from __future__ import annotations

import importlib
import io
import json
import os
import socket
import sys
import threading
from urllib.parse import urlsplit

import pytest
from PIL import Image

pytest.importorskip("starlette", reason="needs the extra `review`")
pytest.importorskip("httpx", reason="needs httpx, which Starlette's test client uses")

from starlette.testclient import TestClient

from fastreid_uns.errors import InvalidState, InvalidValue, MissingPackage
from fastreid_uns.photos.members import Member
from fastreid_uns.photos.review import Review
from fastreid_uns.photos.server import LARGEST_IMAGE, WEB, Server, create_app
from fastreid_uns.photos.store import PhotoRun
from fastreid_uns.photos.thumbnails import photo_id

TOKEN = "a-random-token"
HEADERS = {"X-Token": TOKEN}


def identify(content: bytes) -> dict:
    if content == b"no image":
        raise InvalidValue("upload: is no picture. Send an image file.")
    return {"answer": "known", "group": 3, "similarity": len(content) / 100}


@pytest.fixture
def client(small_run) -> TestClient:
    return TestClient(create_app(Review(small_run), TOKEN, identify), base_url="http://127.0.0.1:8000")


def get(client: TestClient, path: str, **options):
    return client.get(f"/{TOKEN}/{path}", **options)


def post(client: TestClient, path: str, fields, **options):
    return client.post(f"/{TOKEN}/{path}", json=fields, **{"headers": HEADERS, **options})


def mark(client: TestClient, number: int) -> str:
    return get(client, f"api/groups/{number}").json()["mark"]


ADDRESSES = (
    "",
    "api/state",
    "api/groups",
    "web/review.js",
    f"thumbnail/{photo_id('a1.png')}",
    f"photo/{photo_id('a1.png')}",
)


@pytest.mark.parametrize("path", ADDRESSES)
def test_every_address_needs_the_token(client, path):
    assert get(client, path).status_code == 200
    for wrong in (f"/{path}", f"/wrong/{path}", f"/{TOKEN}x/{path}", f"/{TOKEN[:-1]}/{path}", f"//{TOKEN}/{path}"):
        assert client.get(wrong).status_code == 403, wrong


def test_the_token_may_come_in_the_query_or_a_header(client):
    answer = client.get(f"/?token={TOKEN}", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, f"/{TOKEN}/")
    assert client.get(f"/{TOKEN}").status_code == 200
    assert client.get("/api/state", headers=HEADERS).status_code == 200
    assert client.get("/?token=wrong").status_code == 403


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil:8000", "", "[::2]", "a@b[", "10.0.0.5"]
)
def test_other_host_names_are_refused(client, host):
    assert get(client, "api/state", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "LOCALHOST", "[::1]:8000"])
def test_names_of_this_computer_are_answered(client, host):
    assert get(client, "api/state", headers={"Host": host}).status_code == 200


def test_a_form_of_another_page_changes_nothing(client):
    fields = {"first": photo_id("a1.png"), "second": photo_id("b1.png"), "answer": "same"}
    assert post(client, "api/answer", fields, headers={}).status_code == 403
    assert post(client, "api/answer", fields, headers={"X-Token": "wrong"}).status_code == 403
    for origin in ("https://evil.example", "null"):
        assert post(client, "api/answer", fields, headers={**HEADERS, "Origin": origin}).status_code == 403
    assert get(client, "api/answer").status_code == 405
    assert get(client, "api/state").json()["answered"] == 0
    own = {**HEADERS, "Origin": "http://127.0.0.1:8000"}
    assert post(client, "api/answer", fields, headers=own).json()["state"]["answered"] == 1


def test_no_path_leads_out_of_the_folder(client, small_run):
    (small_run.photos.parent / "secret.jpg").write_bytes(b"secret")
    for path in (
        "thumbnail/..%2f..%2fsecret.jpg",
        "photo/..%2fsecret.jpg",
        "photo/%2fetc%2fpasswd",
        "web/..%2f..%2ferrors.py",
        "web/%2e%2e/%2e%2e/errors.py",
        "web//etc/passwd",
        "web/",
        "photo/a1.png",
    ):
        assert get(client, path).status_code in (403, 404, 405), path


def test_headers_forbid_what_the_page_does_not_need(client):
    for path in ("", "web/review.js", "api/state", "nothing"):
        headers = get(client, path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "set-cookie" not in headers
        assert "access-control-allow-origin" not in headers


def test_the_page_names_no_other_host_and_makes_no_html_of_data():
    for file in WEB.iterdir():
        text = file.read_text()
        assert text.replace("http://www.w3.org/2000/svg", "").find("://") < 0, file.name
    script = (WEB / "review.js").read_text()
    for danger in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert danger not in script


def test_pictures(client):
    for path in ("thumbnail", "photo"):
        answer = get(client, f"{path}/{photo_id('a2.png')}")
        assert answer.headers["content-type"] == "image/jpeg"
        assert Image.open(io.BytesIO(answer.content)).size == (96, 64)
        assert get(client, f"{path}/{'0' * 20}").status_code == 404


def test_answer_merge_split_undo(client):
    fields = {"first": photo_id("a1.png"), "second": photo_id("a2.png"), "answer": "unsure"}
    assert post(client, "api/answer", fields).json()["state"]["answered"] == 1
    merge = {"first": 1, "first_mark": mark(client, 1), "second": 2, "second_mark": mark(client, 2)}
    assert post(client, "api/merge", merge).json()["state"]["groups"] == 3
    split = {"number": 1, "mark": mark(client, 1), "photos": [photo_id("a3.png")], "together": True}
    state = post(client, "api/split", split).json()["state"]
    assert (state["groups"], state["changes"]) == (4, 2)
    done = post(client, "api/undo", {"row": state["undo"]}).json()
    assert (done["done"]["kind"], done["state"]["groups"]) == ("split", 3)
    assert [answer["kind"] for answer in get(client, "api/answers").json()["answers"]] == ["merge", "pair"]


def test_a_stale_window_gets_a_clear_answer(client):
    old = {"number": 1, "mark": mark(client, 1), "photos": [photo_id("a3.png")], "together": True}
    assert post(client, "api/split", old).status_code == 200
    again = post(client, "api/split", old)
    assert again.status_code == 409
    assert again.json()["stale"]
    assert "another window" in again.json()["error"]


def test_a_contradiction_names_the_answer_to_take_back(client):
    fields = {"first": photo_id("a1.png"), "second": photo_id("a2.png"), "answer": "same"}
    post(client, "api/answer", fields)
    refused = post(client, "api/answer", {**fields, "answer": "different"})
    assert (refused.status_code, refused.json()["row"]) == (409, 1)
    assert "contradicts" in refused.json()["error"]


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{", b'{"first": 1}', b'{"row": true}', b'{"row": "1"}', b'{"row": null}', b"[" * 100_000, b"\xff"],
)
def test_a_request_that_makes_no_sense_is_told_so(client, body):
    answer = client.post(f"/{TOKEN}/api/undo", content=body, headers=HEADERS)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("server: ")


def test_numbers_in_addresses_are_bounded(client):
    for query in ("page=x", "page=-1", "page=99999999999", "least=1e3", "order=beauty"):
        assert get(client, f"api/groups?{query}").status_code in (400, 404), query
    assert get(client, "api/questions?count=1000").status_code == 200


def test_names_of_any_bytes_can_be_told(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    name = os.fsdecode(b"\xff\xfe.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(photos / name)
    run = PhotoRun.create(tmp_path / "out", photos)
    run.write_groups([Member(name, 1, 0.5), Member("</script>.png", 1, 0.9)])
    client = TestClient(create_app(Review(run), TOKEN), base_url="http://localhost")
    shown = get(client, "api/groups/1").json()["photos"]
    assert [photo["name"] for photo in shown] == ["\\xff\\xfe.png", "</script>.png"]
    assert get(client, f"photo/{shown[0]['id']}").status_code == 200


def test_identify(client):
    answer = client.post("/identify", content=b"x" * 50, headers=HEADERS)
    assert answer.json() == {"answer": "known", "group": 3, "similarity": 0.5}
    assert client.post("/identify", content=b"x").status_code == 403
    assert client.post("/identify", content=b"", headers=HEADERS).status_code == 400
    wrong = client.post("/identify", content=b"no image", headers=HEADERS)
    assert (wrong.status_code, wrong.json()["error"]) == (400, "upload: is no picture. Send an image file.")
    large = client.post("/identify", content=bytes(LARGEST_IMAGE + 1), headers=HEADERS)
    assert "larger than 64 MiB" in large.json()["error"]


def test_without_an_index_nothing_is_identified(small_run):
    client = TestClient(create_app(Review(small_run), TOKEN), base_url="http://localhost")
    assert "without an index" in client.post("/identify", content=b"x", headers=HEADERS).json()["error"]


def test_the_server_listens_on_this_computer_only(small_run):
    server = Server(Review(small_run))
    port = int(server.address.split(":")[2].split("/")[0])
    assert server.address == f"http://127.0.0.1:{port}/{server.token}/"
    assert len(server.token) >= 32
    assert Server(Review(small_run)).token != server.token
    taken = socket.create_server(("127.0.0.1", 0))
    with pytest.raises(InvalidState, match="cannot be used"):
        Server(Review(small_run), port=taken.getsockname()[1])
    taken.close()
    with pytest.raises(InvalidState, match=r"port 80000 cannot be used \(ports are 0 to 65535\)"):
        Server(Review(small_run), port=80_000)


def test_without_its_packages_the_way_to_get_them_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "fastreid_uns.photos.server")
    with pytest.raises(MissingPackage, match=r"pip install 'fastreid_uns\[review\]'"):
        importlib.import_module("fastreid_uns.photos.server")


def test_answers_are_json_that_cannot_be_taken_for_html(client):
    answer = get(client, "api/groups/2")
    assert answer.headers["content-type"] == "application/json"
    assert json.loads(answer.content)["size"] == 3


def test_a_request_that_does_not_end_does_not_hold_up_the_end(small_run):
    begun, ended = threading.Event(), threading.Event()

    def endless(content: bytes) -> dict:
        begun.set()
        ended.wait(60)
        return {}

    server = Server(Review(small_run), endless)
    running = threading.Thread(target=server.run, daemon=True)
    running.start()
    place = urlsplit(server.address)
    with socket.create_connection((place.hostname, place.port)) as client:
        token = place.path.strip("/") or place.query.partition("=")[2]
        head = f"POST /identify HTTP/1.1\r\nHost: {place.netloc}\r\nX-Token: {token}\r\nContent-Length: 1\r\n\r\nx"
        client.sendall(head.encode())
        assert begun.wait(20)
        server.stop()
        running.join(20)
        ended.set()
        assert not running.is_alive()
