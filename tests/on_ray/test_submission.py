"""What `cluster/submit.py` refuses before it sends anything, what it would send, and whom it would send it to."""

import http.server
import socket
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

pytest.importorskip("ray", reason="Ray is not installed: pip install -r requirements/ray.txt")
sys.path.insert(0, str(Path(__file__).parents[2] / "cluster"))
import bundle
import dashboard
import submit

from embedshard.errors import ConfigError

TOKEN = "f" * 64


@pytest.fixture(autouse=True)
def own_environment(monkeypatch, tmp_path):
    """No home, no token and no cluster of the machine's user."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("EMBEDSHARD_RUNS", "EMBEDSHARD_DATA"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def serve():
    """Starts HTTP servers that ask for a token, or not; returns their URL and what they were sent."""
    servers = []

    def serve(token=None, body=b'{"ray_version": "2.60.0"}', host="127.0.0.1"):
        sent = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                header = self.headers.get("Authorization")
                sent.append(header)
                code = 200 if token is None or header == f"Bearer {token}" else 401 if header is None else 403
                self.send_response(code)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *given):
                pass

        server = http.server.ThreadingHTTPServer((host, 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://{host}:{server.server_address[1]}", sent

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def other_address():
    """An address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback")
        return probe.getsockname()[0]


def check(url, token=None, anyone_may_run_code=False):
    said = []
    sent = dashboard.check_dashboard(
        url, token and dashboard.Token(token, "a test"), anyone_may_run_code=anyone_may_run_code, say=said.append
    )
    return sent, said


def test_the_three_kinds_of_refusal_say_three_things(serve, other_address):
    url, _ = serve(TOKEN)
    with pytest.raises(ConfigError, match=r"asks for a token \(401\) and there is none here"):
        check(url)
    with pytest.raises(ConfigError, match=r"refuses the token \(403\) of a test"):
        check(url, "0" * 64)
    url, sent = serve(host=other_address)
    with pytest.raises(ConfigError, match="is open: it asks for no token and is not on this machine's loopback"):
        check(url, TOKEN)
    assert sent == [None]  # it was not told our token


def test_who_is_let_in(serve, other_address):
    url, _ = serve(TOKEN)
    assert check(url, TOKEN)[0].text == TOKEN
    url, sent = serve()
    token, said = check(url, TOKEN)
    assert token is None
    assert "asks for no token: every user of this machine" in said[0]
    assert sent == [None]
    url, _ = serve(host=other_address)
    token, said = check(url, anyone_may_run_code=True)
    assert token is None
    assert "everybody who reaches it" in said[0]
    url, _ = serve(TOKEN, host=other_address)
    assert "unencrypted" in check(url, TOKEN)[1][0]


def test_what_is_not_a_dashboard_is_refused(serve):
    url, _ = serve(body=b"<html>another program</html>")
    with pytest.raises(ConfigError, match="is not the dashboard of a Ray cluster"):
        check(url)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(ConfigError, match="nothing answers there"):
        check(f"http://127.0.0.1:{port}")
    with pytest.raises(ConfigError, match="must be the dashboard's URL"):
        check("127.0.0.1:6379")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:1", True), ("http://127.8.8.8:1", True), ("http://[::1]:1", True), ("http://localhost:1", True),
        ("http://[::ffff:127.0.0.1]:1", True), ("http://0.0.0.0:1", False), ("http://10.0.0.1:1", False),
        ("http://127.0.0.1@10.0.0.1:1", False), ("http://[::ffff:10.0.0.1]:1", False),
    ],
)  # fmt: skip
def test_what_loopback_is(url, expected):
    assert dashboard.is_loopback(url) is expected


def test_a_token_is_found_where_ray_finds_it(tmp_path):
    assert dashboard.find_token({}) is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("of home\n")
    (tmp_path / "token").write_text("of path\n")
    named = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    assert dashboard.find_token({}).text == "of home"
    assert dashboard.find_token(named).text == "of path"
    assert dashboard.find_token({**named, "RAY_AUTH_TOKEN": "of text"}).text == "of text"
    assert "of text" not in repr(dashboard.find_token({"RAY_AUTH_TOKEN": "of text"}))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        dashboard.find_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")})


@pytest.fixture
def folder(tmp_path):
    """A working directory with all that people have in one."""
    top = tmp_path / "work"
    for name in (
        "config.yaml", "my_models/wide.py", "my_models/data/words.py", "data/train.parquet", "runs/a/config.yaml",
        ".git/HEAD", ".venv/bin/python", "my_models/__pycache__/wide.pyc", "keys/me.pem", ".env",
        ".aws/credentials", "big.parquet",
    ):  # fmt: skip
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(name)
    return top


def test_modules_are_sent_and_data_runs_and_secrets_stay(folder, tmp_path):
    packed = bundle.bundle(folder, tmp_path / "first.zip")
    assert [str(path) for path in packed.files] == ["config.yaml", "my_models/data/words.py", "my_models/wide.py"]
    with zipfile.ZipFile(packed.path) as archive:
        assert archive.read("my_models/wide.py") == b"my_models/wide.py"
    (folder / "config.yaml").touch()
    assert bundle.bundle(folder, tmp_path / "second.zip").path.read_bytes() == packed.path.read_bytes()
    fewer = bundle.bundle(folder, tmp_path / "third.zip", ["my_models/data"])
    assert [str(path) for path in fewer.files] == ["config.yaml", "my_models/wide.py"]


def test_a_folder_that_is_too_large_is_refused_with_its_largest_files(folder, tmp_path):
    with (folder / "weights.bin").open("wb") as file:
        file.truncate(bundle.MOST_BYTES + 1)
    with pytest.raises(ConfigError, match=r"largest found so far: weights.bin \(100"):
        bundle.bundle(folder, tmp_path / "archive.zip")
    bundle.bundle(folder, tmp_path / "archive.zip", ["*.bin"])


@pytest.fixture
def run(make_config, interactions, folder, monkeypatch):
    """Runs `submit.py`, in its folder, with a config whose data are named by ${EMBEDSHARD_DATA}; returns what it raises."""
    text = yaml.safe_dump(make_config().tree).replace(str(interactions), "${EMBEDSHARD_DATA}")
    (folder / "config.yaml").write_text(text)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("EMBEDSHARD_DATA", str(interactions))

    def run(*arguments):
        result = CliRunner().invoke(submit.app, ["--address", "http://127.0.0.1:1", *arguments])
        return str(result.exception)

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give a config"),
        (["config.yaml"], "No --runs and no --run-dir is given"),
        (["--run-dir", "runs/a", "config.yaml"], "runs/a is a relative path"),
        (["--runs", "/r", "/tmp/config.yaml"], "is not in the working directory"),
        (["--runs", "/r", "confg.yaml"], "there is no such file. "),
        (["--runs", "/r", "config.yaml", "--set", "train.epochs=none"], "train.epochs"),
        (["--runs", "/r", "--workers", "0", "config.yaml"], "give a number of at least 1"),
        (["--runs", "/r", "--env", "NOT_SET_HERE", "config.yaml"], "--env NOT_SET_HERE is not set here"),
        (["--runs", "/r", "--env", "A_SECRET=abc", "config.yaml"], "--env A_SECRET has a value in it"),
        (["--resume", "/r/a", "--run-dir", "/r/b", "config.yaml"], "name two folders"),
        (["--follow", "job", "config.yaml"], "--follow job sends nothing"),
        (["--runs", "/r", "config.yaml"], "nothing answers there"),
        (["--runs", "s3://bucket/runs", "config.yaml"], "nothing answers there"),
    ],
)
def test_mistakes_are_told_before_anything_is_sent(run, arguments, message):
    assert message in run(*arguments)


def test_relative_data_are_refused(run, monkeypatch):
    monkeypatch.setenv("EMBEDSHARD_DATA", "data")
    assert "data.train is 'data/train/*.parquet', a relative path" in run("--runs", "/r", "config.yaml")


def test_the_entry_point_quotes_what_a_shell_would_take_apart():
    job = submit.Job(Path("/w"), Path("a b.yaml"), "/runs/x", False, "2:4", ("--set", "name=a;b"), ())
    assert job.entrypoint == ("embedshard train 'a b.yaml' --launcher ray --workers 2:4 --run-dir /runs/x --set 'name=a;b'")
    resumed = submit.Job(Path("/w"), None, "/runs/x", True, None, (), ())
    assert resumed.entrypoint == "embedshard train --launcher ray --resume /runs/x"
