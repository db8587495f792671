"""The HTTP interface behind nginx and Caddy, by the very files in ``examples/serving``."""

from __future__ import annotations

import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from delineate.serving.http.gateway import Gateway
from delineate.serving.keys import added, read_server_keys, write_key
from delineate.serving.server import listen
from delineate.serving.settings import Settings

EXAMPLES = Path(__file__).parents[3] / "examples" / "serving"
MOST = 4 * 2**20
"""Bytes of a scan that the server accepts."""
NAME = "Mustermann"
MAIN = """
daemon off;
pid {folder}/pid;
error_log {folder}/main.log crit;
events {{}}
http {{
    client_body_temp_path {folder}/temporary;
    proxy_temp_path {folder}/temporary;
    include {folder}/nginx.conf;
}}
"""
"""A distribution's nginx.conf, as far as the example needs it."""


def until(condition: Callable[[], Any], what: str, seconds: float = 30.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
    return found


class Proxy:
    """nginx or Caddy before a server: by the example, with a port, a certificate and places of a test's own."""

    def __init__(self, kind: str, folder: Path, server: str, **other: str) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        certificate, key = _certificate(folder)
        self.tls = ssl.create_default_context(cafile=certificate)
        file = folder / {"nginx": "nginx.conf", "caddy": "Caddyfile"}[kind]
        text = (EXAMPLES / file.name).read_text(encoding="utf-8")
        for there, here in {
            "127.0.0.1:8420": server,
            **{f"{place}gpu.hospital.example.pem": str(certificate) for place in ("/etc/ssl/certs/", "/etc/caddy/")},
            **{f"{place}gpu.hospital.example.key": str(key) for place in ("/etc/ssl/private/", "/etc/caddy/")},
            "/var/log/nginx/": f"{folder}/",
            "listen 443": f"listen 127.0.0.1:{self.port}",
            "\ngpu.hospital.example {": f"\nlocalhost:{self.port} {{\n\tbind 127.0.0.1",
            "gpu.hospital.example": "localhost",
            **other,
        }.items():
            text = text.replace(there, here)
        file.write_text(text, encoding="utf-8")
        if kind == "nginx":
            (folder / "temporary").mkdir()
            (folder / "main.conf").write_text(MAIN.format(folder=folder), encoding="utf-8")
            command = ["nginx", "-c", f"{folder}/main.conf", "-e", f"{folder}/main.log"]
        else:
            command = ["caddy", "run", "--config", str(file), "--adapter", "caddyfile"]
        environment = {**os.environ, "HOME": str(folder), "XDG_DATA_HOME": f"{folder}/data"}
        environment |= {"XDG_CONFIG_HOME": f"{folder}/config", "CADDY_ADMIN": f"unix/{folder}/admin"}
        with (folder / "caddy.log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        until(lambda: self._listens() or self._process.poll() is not None, "the proxy listens")
        assert self._process.poll() is None, self.logged()
        if kind == "nginx":
            (folder / "temporary").rmdir()  # what it would put down there is now an error

    def _listens(self) -> bool:
        with socket.socket() as tcp:
            return tcp.connect_ex(("127.0.0.1", self.port)) == 0

    def client(self, token: str = "") -> httpx.Client:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        return httpx.Client(
            base_url=f"https://localhost:{self.port}", verify=self.tls, headers=headers, timeout=60, trust_env=False
        )

    def connect(self) -> ssl.SSLSocket:
        return self.tls.wrap_socket(
            socket.create_connection(("127.0.0.1", self.port), timeout=30), server_hostname="localhost"
        )

    def logged(self) -> str:
        return "\n".join(path.read_text(encoding="utf-8") for path in self.folder.glob("*.log"))

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(15)


def _certificate(folder: Path) -> tuple[Path, Path]:
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    about = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2"]
    about += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    made = ["openssl", "req", "-x509", *about, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(made, check=True, capture_output=True)
    return certificate, key


class Served:
    """A server with keys, and a token of it."""

    def __init__(self, running: Any) -> None:
        self.address, path = running.about["http"], running.state / "server.json"
        keys, own = added(read_server_keys(path), "anna", "client", running.address)
        write_key(path, keys)
        self.token = own.token


@pytest.fixture(scope="module")
def server(new_drivers, bundles, tmp_path_factory) -> Iterator[Served]:
    found = new_drivers(tmp_path_factory.mktemp("s"))
    settings = {"http": "127.0.0.1:0", "plain": False, "limits": {"job_bytes": MOST}}
    try:
        yield Served(found.serve({"one": bundles.folders["one"]}, **settings))
    finally:
        found.end()


@pytest.fixture(scope="module", params=["nginx", "caddy"])
def new_proxy(request, tmp_path_factory) -> Iterator[Callable[..., Proxy]]:
    """Starts proxies of a kind."""
    for program in (request.param, "openssl"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    found: list[Proxy] = []

    def new(server: str, **other: str) -> Proxy:
        found.append(Proxy(request.param, tmp_path_factory.mktemp("p"), server, **other))
        return found[-1]

    yield new
    for proxy in found:
        proxy.close()


@pytest.fixture(scope="module")
def proxy(new_proxy, server) -> Proxy:
    return new_proxy(server.address)


@pytest.fixture
def https(proxy, server) -> Iterator[httpx.Client]:
    with proxy.client(server.token) as client:
        yield client


def head(path: str, token: str, *lines: str) -> bytes:
    words = [f"PUT {path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {token}", *lines, "", ""]
    return "\r\n".join(words).encode()


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(content), content)


def test_a_scan_is_sent_watched_and_fetched(https, bundles, large) -> None:
    until(lambda: https.get("/readyz").status_code != 503, "its workers have started")
    assert https.get("/readyz").json() == {"status": "ready"}
    assert https.head("/livez").status_code == 200
    answer = https.post("/v1/jobs", params={"input": "nii.gz", "outputs": "nii.gz"}, content=large.path.read_bytes())
    assert answer.status_code == 201, answer.text
    job = answer.url.join(answer.headers["location"])
    seen = []
    until(lambda: seen.append(https.get(job).json()) or seen[-1]["state"] in ("done", "failed"), "it ends", 120)
    assert seen[-1]["state"] == "done"
    assert "infer" in {one["stage"] for one in seen}, seen
    assert https.get(f"{job}/outputs/label.nii.gz").content == large.label
    assert https.delete(job).json()["outputs"] == []


@pytest.mark.parametrize("length", ["Content-Length: 3145728", "Transfer-Encoding: chunked"])
def test_a_body_is_passed_on_as_it_comes(proxy, https, server, length) -> None:
    def received() -> float:
        found = re.search(r"^delineate_received_bytes_total (\S+)", https.get("/metrics").text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    before, job, content = received(), uuid.uuid4(), os.urandom(3 * 2**20)
    as_sent = chunk if "chunked" in length else bytes
    with proxy.connect() as tcp:
        tcp.sendall(head(f"/v1/jobs/{job}?input=nii:{len(content)}", server.token, length))
        tcp.sendall(as_sent(content[: 2 * 2**20 + 4096]))
        until(lambda: received() - before >= 2 * 2**20, "the server has what was sent")
        tcp.sendall(as_sent(content[2 * 2**20 + 4096 :]) + (b"0\r\n\r\n" if "chunked" in length else b""))
        assert tcp.recv(4096).startswith(b"HTTP/1.1 201 ")
    assert https.delete(f"/v1/jobs/{job}").status_code == 200


def test_what_is_refused_is_refused_by_the_servers_own_words(proxy, https, server) -> None:
    with proxy.client() as stranger:
        answer = stranger.get("/v1/jobs")
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "E_DENIED")
        assert answer.headers["www-authenticate"] == "Bearer"
    path = f"/v1/jobs/{uuid.uuid4()}?input=nii"
    for size, length in (("", f"Content-Length: {MOST + 1}"), (f":{MOST + 1}", "Transfer-Encoding: chunked")):
        with proxy.connect() as tcp:
            tcp.sendall(head(path + size, server.token, length, "Expect: 100-continue"))
            answer = b""
            while (more := tcp.recv(4096)) and b"E_TOO_LARGE" not in (answer := answer + more):
                pass
            assert answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").startswith(b"HTTP/1.1 413 ")
    for content in (bytes(3 * MOST), (bytes(MOST) for _ in range(3))):
        answer = https.post(f"/v1/jobs?input=nii:{3 * MOST}", content=content)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "E_TOO_LARGE")
        if answer.headers["server"] == "nginx":  # which promises to keep every connection, and closes this one
            assert "close" in answer.headers["connection"]
    answer = https.post("/v1/jobs?input=nii", content=(bytes(2**20) for _ in range(2)))
    assert (answer.status_code, answer.json()["error"]["code"]) == (411, "E_PROTOCOL")


def test_it_may_be_served_under_a_prefix(new_proxy, server) -> None:
    nginx = {"location / {": "location /delineate/ {", f"http://{server.address};": f"http://{server.address}/;"}
    caddy = {"\treverse_proxy": "\turi strip_prefix /delineate\n\treverse_proxy"}
    proxy = new_proxy(server.address, **nginx, **caddy)
    with proxy.client(server.token) as https:
        told = https.get("/delineate/openapi.json")
        base = str(told.url.join(told.json()["servers"][0]["url"])).rstrip("/")
        answer = https.post(f"{base}/v1/jobs?input=nii", content=b"no scan")
        assert https.delete(answer.url.join(answer.headers["location"])).status_code == 200


def test_without_keys_nobody_comes_in_by_a_proxy(new_proxy, tmp_path) -> None:
    with listen("127.0.0.1:0", plain=True) as listener:
        gateway = Gateway(Settings(tmp_path, plain=True), listener)
        thread = threading.Thread(target=gateway.run)
        thread.start()
        try:
            proxy = new_proxy(f"127.0.0.1:{listener.getsockname()[1]}")
            with proxy.client() as https:
                answer = https.get("/v1/models", headers={"host": "localhost"})
                assert (answer.status_code, answer.json()["error"]["code"]) == (403, "E_DENIED")
        finally:
            gateway.stop()
            thread.join(15)


def test_a_proxy_logs_no_names(new_proxy, server) -> None:
    with listen("127.0.0.1:0", plain=True) as nobody:
        proxy = new_proxy(f"127.0.0.1:{nobody.getsockname()[1]}")
    with proxy.client(NAME) as https:
        path = f"/v1/jobs/{NAME}?input={NAME}:nii"
        assert https.put(path, content=b"?").status_code == 502
    until(proxy.logged, "it logs something")
    assert NAME not in proxy.logged()
