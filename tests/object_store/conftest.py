"""An S3 server on loopback, as the environment names it to every process."""

import logging
import os
import uuid

import pytest

moto_server = pytest.importorskip("moto.server", reason="moto is not installed: pip install -r requirements/dev.txt")


@pytest.fixture(scope="session")
def s3_environment():
    """Starts the server; returns what the environment says of it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = moto_server.ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    yield {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_EC2_METADATA_DISABLED": "true",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    server.stop()


@pytest.fixture
def bucket(s3_environment, monkeypatch):
    """Returns the URI of a new bucket; this process and those that it starts find it."""
    import boto3

    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    name = f"runs-{uuid.uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).create_bucket(Bucket=name)
    return f"s3://{name}"
