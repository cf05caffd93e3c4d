"""What strangers may try, and what the service answers."""

from __future__ import annotations

import asyncio
import base64
import json
import pickle
import socket
import struct
import tempfile
import time
import zlib
from pathlib import Path

import pytest
from aiohttp import web

from lightx2v_core.api_server import pictures, remote
from lightx2v_core.api_server.body import Limits, new_task_id, read_body, result_name
from lightx2v_core.api_server.options import parse
from lightx2v_core.errors import RequestError
from tests.unit.service.running import Running, base64_png, png


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    options = {
        "task": "i2v",
        "limits": Limits(100_000, 10_000_000),
        "header_seconds": 1.0,
        "body_seconds": 1.0,
    }
    with Running(tmp_path_factory.mktemp("results") / "inside", **options) as running:
        yield running


@pytest.fixture(scope="module")
def with_token(tmp_path_factory):
    with Running(tmp_path_factory.mktemp("results"), token="s3cret") as running:
        yield running


OWNED = Path(tempfile.gettempdir()) / "lightx2v-pickle-was-run"


class Exploit:
    def __reduce__(self):
        return (exec, (f"open({str(OWNED)!r}, 'w')",))


@pytest.mark.parametrize(
    "name",
    [
        *(
            "/etc/cron.d/x.mp4",
            "../x.mp4",
            "a/../../x.mp4",
            "..\\x.mp4",
            "C:\\x.mp4",
            "\\\\host\\x.mp4",
        ),
        *("x\0.mp4", "x\n.mp4", "x.sh", ".", "..", "x" * 300, "<script>.mp4", '"x".mp4'),
    ],
)
def test_no_name_leaves_the_result_folder(service, name):
    status, reply = service.post({"image_path": base64_png(), "save_result_path": name})

    assert status == 400 and "save_result_path" in reply["detail"]


@pytest.mark.parametrize("name", ["../../x", "a/b", "", " ", "x" * 65, "..", "a\0b"])
def test_a_task_id_is_never_a_path(service, name):
    status, reply = service.post({"image_path": base64_png(), "task_id": name})

    if name == "":
        assert status == 200 and service.until(reply["task_id"], "completed")
    else:
        assert status == 400 and "task_id" in reply["detail"]


@pytest.mark.parametrize(
    "path",
    [
        "/v1/files/download/../journal.sqlite",
        "/v1/files/download/..%2fjournal.sqlite",
        "/v1/files/download/%2e%2e/journal.sqlite",
        "/v1/files/download//etc/passwd",
        "/v1/files/download/%00",
        "/v1/tasks/..%2f..%2fetc/result",
    ],
)
def test_downloads_do_not_read_the_disk_by_name(service, path):
    assert service.call("GET", path)[0] == 404


@pytest.mark.parametrize("path", ["/etc/passwd", "assets/img_0.jpg", "file:///etc/passwd", "."])
def test_paths_of_the_service_are_not_read_as_pictures(service, path):
    status, reply = service.post({"image_path": path})

    assert status == 400 and "send the picture itself" in reply["detail"]


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"prompt": 1}', b"[" * 100_000, b"1" * 9000),
        *(b'{"seed": 1e5}', b'{"seed": true}', b'{"seed": -1}', b'{"seed": 99999999999999999999}'),
        *(b'{"target_shape": [1]}', b'{"target_shape": ["a", 1]}', b'{"target_shape": [16, 1e9]}'),
        *(b'{"target_video_length": 0}', b'{"prompt": ["x"]}', b'{"lora_strength": NaN}'),
        *(b'{"lora_name": "../x"}', b'{"lora_name": "/x"}', b'{"lora_name": ".x"}'),
        *(b'{"video_path": "/x"}', b'{"presigned_url": "http://x"}', b'{"reuse": true}'),
        b'{"prompt": "' + b"x" * 10_001 + b'"}',
        b'{"target_shape": [4096, 4096], "target_video_length": 81}',
    ],
)
def test_bad_bodies_get_a_sentence_and_no_task(service, body):
    before = service.get("/v1/service/status")[1]["total_tasks"]

    status, reply = service.post(body)

    assert status == 400 and len(reply["detail"]) < 400
    assert service.get("/v1/service/status")[1]["total_tasks"] == before


def test_only_json_and_forms_are_read(service):
    assert service.post(b"{}", **{"Content-Type": "text/plain"})[0] == 415
    assert service.post(b"{}", "/v1/tasks/video/form")[0] == 415
    assert service.call("PUT", "/v1/tasks/", b"{}")[0] == 405
    assert service.get("/nothing")[0] == 404


def test_too_much_is_refused_while_it_comes(service):
    large = base64.b64encode(b"x" * 150_000).decode()

    assert service.post({"image_path": large})[0] == 413
    assert service.post(b"x" * 1_500_000)[0] == 413
    assert service.form({}, [("image_file", "x.png", b"x" * 150_000)])[0] == 413
    assert service.form({"prompt": "x" * 70_000})[0] == 413
    assert service.form({f"f{i}": "x" for i in range(50)})[0] == 400


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(Exploit()),
        b"GIF89a\x01\x00\x01\x00\x00\x00\x00;",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe\n",
        png()[:40],
        png(64, 64)[:-30],
        b"\x89PNG\r\n\x1a\n" + b"\0" * 50,
        b"RIFF\xff\xff\xff\xffWEBPVP8 ",
    ],
    ids=["pickle", "gif", "svg", "postscript", "head alone", "cut", "no chunks", "empty webp"],
)
def test_only_whole_pictures_pass(service, data):
    as_file = service.form({}, [("image_file", "innocent.png", data)])
    as_text = service.post({"image_path": base64.b64encode(data).decode()})

    assert as_file[0] == as_text[0] == 400
    assert "image_path" in as_file[1]["detail"]
    assert not list((service.options.result_dir / "inputs").iterdir())
    assert not OWNED.exists()


@pytest.mark.parametrize("side", [8000, 20_000])
def test_a_small_file_that_unpacks_to_gigabytes_is_refused_by_its_header(side):
    def chunk(kind, data):
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000))

    with pytest.raises(RequestError, match="million pixels|too many pixels"):
        pictures.check_picture(bomb, "image_path")


def test_other_files_in_a_form_are_refused(service):
    files = [("image_file", "x.png", png()), ("audio_file", "x.wav", b"RIFF")]

    status, reply = service.form({}, files)

    assert status == 400 and "audio_file" in reply["detail"]


def test_a_client_that_never_ends_its_headers_is_let_go(service):
    with socket.create_connection(("127.0.0.1", service.port)) as client:
        started = time.monotonic()
        client.settimeout(10)
        client.sendall(b"POST /v1/tasks/ HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")

        assert client.recv(100) == b""
        assert time.monotonic() - started < 8


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x"])
def test_a_client_that_never_ends_its_body_is_let_go(service, kind):
    path = "/v1/tasks/" if "json" in kind else "/v1/tasks/form"
    with socket.create_connection(("127.0.0.1", service.port)) as client:
        client.settimeout(10)
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
        client.sendall(head.encode() + b"Content-Length: 1000\r\n\r\n{")

        assert b" 408 " in client.recv(100)
        assert service.get("/health")[0] == 200


@pytest.mark.parametrize(
    "value", ["bytes=10000-", "bytes=5-2", "bytes=a-b", "bytes=" + "0-1," * 5000 + "0-1", "bytes=-"]
)
def test_ranges_that_cannot_be_met_cost_nothing(service, value):
    name = service.made(image_path=base64_png())["task_id"]

    status, _, data = service.call(
        "GET", f"/v1/tasks/{name}/result", headers={"Range": value[:7000]}
    )

    assert status in (416, 400) and len(data) < 5000


def test_a_token_is_asked_for_everywhere_but_by_probes(with_token):
    right = {"Authorization": "Bearer s3cret"}

    for path in ("/v1/tasks/", "/v1/service/status", "/metrics", "/docs", "/openapi.json", "/x"):
        assert with_token.call("GET", path)[0] == 401, path
    assert with_token.post({"prompt": "a"})[0] == 401
    assert with_token.delete("/v1/tasks/all/running")[0] == 401
    for wrong in ("Bearer s3cre", "Bearer s3cret ", "s3cret", "Basic s3cret", "Bearer é"):
        header = {"Authorization": wrong.encode().decode("latin-1")}
        assert with_token.call("GET", "/v1/tasks/", headers=header)[0] == (
            200 if wrong.endswith(" ") else 401  # http.client and servers strip what ends a header
        ), wrong
    assert with_token.call("GET", "/v1/tasks/", headers=right)[0] == 200
    assert with_token.post({"prompt": "a"}, **right)[0] == 200
    assert with_token.get("/health")[0] == 200 and with_token.get("/ready")[0] in (200, 503)


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example:8000"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
    ],
)
def test_pages_of_other_sites_cannot_make_or_stop_videos(service, headers):
    status, _, data = service.call("DELETE", "/v1/tasks/all/running", headers=headers)
    stop = service.call("GET", "/v1/local/video/generate/stop_running_task", headers=headers)

    assert status == 403 and json.loads(data)["detail"] and stop[0] == 403


def test_urls_are_not_fetched_unless_the_service_was_told_to(service):
    status, reply = service.post({"image_path": "http://127.0.0.1:1/x.png"})

    assert status == 400 and "--allow-remote-images" in reply["detail"]


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.1/x", "http://[::1]/x", "http://10.0.0.1/x", "http://192.168.1.1/x"),
        *("http://169.254.169.254/latest/meta-data/", "http://0.0.0.0/x", "http://100.64.0.1/x"),
        *("http://[::ffff:127.0.0.1]/x", "http://[64:ff9b::7f00:1]/x", "http://[fe80::1%25eth0]/x"),
        *("http://2130706433/x", "http://0x7f.1/x", "http://localhost/x", "http://127.1/x"),
        *("http://user@example.com/x", "ftp://example.com/x", "http:///x", "http://[x/"),
        *("http://[2002:7f00:1::]/x", "http://[fc00::1]/x", "http://224.0.0.1/x"),
    ],
)
def test_addresses_that_are_not_public_are_never_asked(url):
    with pytest.raises(RequestError, match="image_path|no public address"):
        asyncio.run(remote.fetch(url, "image_path", 1000))


def test_a_name_is_refused_when_one_of_its_addresses_is_not_public():
    async def resolve(addresses):
        async def getaddrinfo(*_, **__):
            return [(socket.AF_INET, 1, 6, "", (address, 80)) for address in addresses]

        asyncio.get_running_loop().getaddrinfo = getaddrinfo
        return await remote.PublicResolver().resolve("example.com", 80)

    found = asyncio.run(resolve(["93.184.216.34"]))

    assert [entry["host"] for entry in found] == ["93.184.216.34"]
    with pytest.raises(RequestError, match=r"example.com is at 10.0.0.1"):
        asyncio.run(resolve(["93.184.216.34", "10.0.0.1"]))


def test_redirects_are_checked_and_sizes_limited(monkeypatch):
    monkeypatch.setattr(remote, "is_public", lambda text: text == "127.0.0.1")

    async def answer(request):
        if request.path == "/private":
            raise web.HTTPFound("http://127.0.0.2/x.png")
        if request.path == "/round":
            raise web.HTTPFound("/round")
        if request.path == "/far":
            raise web.HTTPFound("/x.png")
        return web.Response(body=png(), status=200 if request.path == "/x.png" else 500)

    async def fetch_all():
        application = web.Application()
        application.router.add_get("/{any}", answer)
        runner = web.AppRunner(application)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        home = f"http://127.0.0.1:{runner.addresses[0][1]}"
        paths = ("/far", "/private", "/round", "/broken", "/x.png")
        try:
            return [
                await asyncio.gather(
                    remote.fetch(home + path, "image_path", 10 if path == "/x.png" else 9999),
                    return_exceptions=True,
                )
                for path in paths
            ]
        finally:
            await runner.cleanup()

    far, private, around, broken, large = (result[0] for result in asyncio.run(fetch_all()))

    assert far == png()
    assert "127.0.0.2 is no public address" in str(private)
    assert "redirected more than 3 times" in str(around)
    assert "answers 500" in str(broken) and "more than" in str(large)


def test_the_service_listens_on_this_machine_alone_unless_told_otherwise(monkeypatch):
    monkeypatch.setenv("LIGHTX2V_TOKEN", "from outside")

    quiet = parse(["--model_path", "demo"])
    open_ = parse(["--model_path", "demo", "--host", "0.0.0.0", "--token", "x", "--seed", "1"])

    assert quiet.host == "127.0.0.1" and quiet.is_local and quiet.token == "from outside"
    assert not open_.is_local and open_.token == "x" and open_.model[-2:] == ("--seed", "1")
    with pytest.raises(RequestError, match="--token is empty"):
        parse(["--model_path", "demo", "--token", " "])


def test_names_and_ids_of_the_service_pass_its_own_checks():
    task_id = new_task_id()

    assert result_name("", task_id) == f"{task_id}.mp4"
    assert result_name("./out/räder 1.mp4", "x") == "out/räder 1.mp4"
    assert read_body({"task_id": task_id}, Limits()).task_id == task_id
