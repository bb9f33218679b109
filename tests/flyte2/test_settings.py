"""Storage settings of Flyte 2 reach s3fs, gcsfs and adlfs."""

from __future__ import annotations

import flyte
import flyte.storage
import pytest

from torchferry.flyte2 import storage_options


@pytest.fixture(autouse=True)
def no_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    flyte.init()
    for name in ("AWS_REGION", "AWS_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


def test_those_of_init_do() -> None:
    flyte.init(
        storage=flyte.storage.S3(
            endpoint="http://minio:9000",
            access_key_id="id",
            secret_access_key="secret",
            region="eu-1",
            addressing_style="virtual",
        )
    )
    assert storage_options("s3://bucket/x") == {
        "key": "id",
        "secret": "secret",
        "endpoint_url": "http://minio:9000",
        "client_kwargs": {"region_name": "eu-1"},
        "config_kwargs": {"s3": {"addressing_style": "virtual"}},
    }
    assert storage_options("s3://bucket/x", anonymous=True)["anon"] is True
    assert "key" not in storage_options("s3://bucket/x", anonymous=True)


def test_those_of_a_pods_environment_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "FLYTE_AWS_ENDPOINT": "http://minio:9000",
        "FLYTE_AWS_ACCESS_KEY_ID": "id",
        "FLYTE_AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "eu-1",
    }.items():
        monkeypatch.setenv(name, value)
    assert storage_options("s3://bucket/x") == {
        "key": "id",
        "secret": "secret",
        "endpoint_url": "http://minio:9000",
        "client_kwargs": {"region_name": "eu-1"},
    }


def test_without_settings_the_clients_find_credentials_themselves() -> None:
    assert storage_options("s3://bucket/x") == {}
    assert storage_options("gs://bucket/x") == {}
    assert storage_options("/tmp/x") == {}
    assert storage_options("abfs://container/x") == {"anon": False}


def test_what_obstore_reads_for_google_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", "/secrets/key.json")
    assert storage_options("gs://bucket/x") == {"token": "/secrets/key.json"}
    assert storage_options("gs://bucket/x", anonymous=True) == {"token": "anon"}


def test_those_for_azure_do(monkeypatch: pytest.MonkeyPatch) -> None:
    flyte.init(storage=flyte.storage.ABFS(account_name="account", account_key="a2V5"))
    assert storage_options("abfs://c/x") == {"account_name": "account", "account_key": "a2V5"}
    flyte.init(storage=flyte.storage.ABFS(account_name="a", tenant_id="t", client_id="c", client_secret="s"))
    assert storage_options("abfss://c/x") == {
        "account_name": "a", "tenant_id": "t", "client_id": "c", "client_secret": "s",
    }  # fmt: skip
    flyte.init()
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "a")
    monkeypatch.setenv("AZURE_CLIENT_ID", "c")  # a workload identity has no secret
    assert storage_options("abfs://c/x") == {"account_name": "a", "anon": False}
