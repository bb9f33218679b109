"""The storage settings of Flyte 2 as those of s3fs, gcsfs and adlfs.

flyte reaches stores through obstore, with ``flyte.init(storage=...)`` or, in a pod, the environment; the filesystems
that torchferry asks to sign its requests have other names for the same settings, and read other variables.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar

import flyte.storage
from flyte._initialize import get_storage
from flyte.errors import InitializationError
from fsspec.utils import get_protocol

__all__ = ["storage_options"]

StorageT = TypeVar("StorageT", flyte.storage.S3, flyte.storage.ABFS)


def storage_options(url: str, *, anonymous: bool = False) -> dict[str, Any]:
    """What ``torchferry.load(url, storage_options=...)`` and the like take to reach a store as Flyte 2 does here.

    Args:
        url: Where something is, or will be.
        anonymous: Without any credentials: public data.

    Returns:
        Arguments for the fsspec filesystem of ``url``; none for files and for stores that flyte has no settings for.
    """
    protocol = get_protocol(url)
    if protocol in {"s3", "s3a"}:
        return _s3(anonymous=anonymous)
    if protocol in {"gs", "gcs"}:
        return _gcs(anonymous=anonymous)
    if protocol in {"abfs", "abfss", "az"}:
        return _azure(anonymous=anonymous)
    return {}


def _configured(kind: type[StorageT]) -> StorageT:
    try:
        storage = get_storage()
    except InitializationError:
        storage = None
    return storage if isinstance(storage, kind) else kind.auto()


def _s3(*, anonymous: bool) -> dict[str, Any]:
    config = _configured(flyte.storage.S3)
    # botocore reads AWS_ENDPOINT_URL and AWS_DEFAULT_REGION; obstore these, too.
    endpoint = config.endpoint or os.environ.get("AWS_ENDPOINT")
    region = config.region or os.environ.get("AWS_REGION")
    options: dict[str, Any] = {}
    if anonymous or _is_true("AWS_SKIP_SIGNATURE"):
        options["anon"] = True
    elif config.access_key_id and config.secret_access_key:
        options |= {"key": config.access_key_id, "secret": config.secret_access_key}
    if endpoint:
        options["endpoint_url"] = endpoint
    if region:
        options["client_kwargs"] = {"region_name": region}
    if config.addressing_style:
        options["config_kwargs"] = {"s3": {"addressing_style": config.addressing_style}}
    return options


def _gcs(*, anonymous: bool) -> dict[str, Any]:
    # google.auth reads GOOGLE_APPLICATION_CREDENTIALS, and asks the metadata server; obstore reads these, too.
    if anonymous or _is_true("GOOGLE_SKIP_SIGNATURE"):
        return {"token": "anon"}
    path = os.environ.get("GOOGLE_SERVICE_ACCOUNT_PATH") or os.environ.get("GOOGLE_SERVICE_ACCOUNT")
    return {"token": path} if path else {}


def _azure(*, anonymous: bool) -> dict[str, Any]:
    config = _configured(flyte.storage.ABFS)
    options: dict[str, Any] = {"account_name": config.account_name} if config.account_name else {}
    if anonymous:
        return {**options, "anon": True}
    if config.account_key:
        return {**options, "account_key": config.account_key}
    # A client id without a secret is that of a workload identity, which azure.identity finds by itself.
    if config.client_id and config.client_secret and config.tenant_id:
        names = ("tenant_id", "client_id", "client_secret")
        return {**options, **{name: getattr(config, name) for name in names}}
    return {**options, "anon": False}


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in {"1", "true", "yes", "on"}
