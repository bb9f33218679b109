"""Messages say what a user needs, and nothing that is nobody else's business."""

from __future__ import annotations

import asyncio
import pickle
import traceback
import uuid
from pathlib import Path

import pytest

import torchferry
from torchferry import errors
from torchferry.errors import CheckpointNotFoundError, StorageError, TorchferryError, mask, masked

WITH_SECRETS = [
    "Cannot read ftp://ferry:TOPSECRET@host/x.pt: broken.",
    "Cannot read ftp://:TOPSECRET@host/x.pt: broken.",
    "Cannot read https://host/x.pt?X-Amz-Date=1&X-Amz-Signature=TOPSECRET: broken.",
    "GET https://host/tokeninfo?access_token=TOPSECRET failed",
    "https://account.blob.core.windows.net/c/x.pt?sv=2024&sig=TOPSECRET&se=2026",
    "GET https://host/x.pt?apikey=TOPSECRET, status 404.",
    "GET https://host/x.pt?part=1&api_key=TOPSECRET",
    "GET https://host/x.pt?X-Api-Key=TOPSECRET&part=1",
    "GET https://host/x.pt?key=TOPSECRET",
    "GET https://host/x.pt?user=me&clientSecret=TOPSECRET",
    "DefaultEndpointsProtocol=https;AccountName=me;AccountKey=TOPSECRET",
    "ClientResponseError: 404, url='https://host/x.pt?token=TOPSECRET'",
]


@pytest.mark.parametrize("text", WITH_SECRETS)
def test_no_message_shows_the_secrets_of_a_url(text: str) -> None:
    assert str(StorageError(text)) == text.replace("TOPSECRET", "***")


@pytest.mark.parametrize("password", ["p@ss", "p/ss", "p@s/s@", "12345", "1234@5", "p:a:s", "p?a#s", "::", "key=a&b"])
def test_password_is_masked_whatever_is_in_it(password: str) -> None:
    assert errors.mask(f"Cannot read ftp://ferry:{password}@host/x.pt.") == "Cannot read ftp://ferry:***@host/x.pt."


@pytest.mark.parametrize("value", ["a:b", "a,b", "a/b+c==", "a.b.c", "user:(x)y"])
def test_field_is_masked_to_its_end(value: str) -> None:
    assert errors.mask(f"https://host/x?token={value}&n=1: no") == "https://host/x?token=***&n=1: no"
    assert errors.mask(f"https://host/x?token={value}: no") == "https://host/x?token=***: no"


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a:b@c.pt?versionId=1&tokens=2 at http://127.0.0.1:8080/x and file:///a@b: broken.",
        "http://minio:9000/bucket/me@work.pt",
        "http://[::1]:9000/bucket/me@work.pt",
        "s3://arn:aws:s3:us-west-2:123456789012:accesspoint/ap/me@work.pt",
        "abfs://container@account.dfs.core.windows.net/a:b@c.pt",
        "https://host/x.pt?monkey=1&design=2&author=3",
    ],
)
def test_what_is_no_secret_is_shown(text: str) -> None:
    assert str(StorageError(5, text)) == text


def test_each_url_of_a_chain_is_masked_by_itself() -> None:
    chain = "zip://x.pt::simplecache::ftp://ferry:TOPSECRET@host/x.zip"
    assert errors.mask(chain) == chain.replace("TOPSECRET", "***")


def all_errors() -> list[type[TorchferryError]]:
    kinds = [getattr(errors, name) for name in errors.__all__]
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, TorchferryError)]


@pytest.mark.parametrize("kind", all_errors())
@pytest.mark.parametrize("args", [("see ftp://u:TOPSECRET@h/x",), (2, "see ftp://u:TOPSECRET@h/x")])
def test_arguments_repr_notes_and_pickle_show_no_secret(kind: type[TorchferryError], args: tuple[object, ...]) -> None:
    error = kind(*args)
    error.add_note("This happened while loading https://h/x?sig=TOPSECRET.")
    assert str(error) == "see ftp://u:***@h/x"
    assert error.__notes__ == ["This happened while loading https://h/x?sig=***."]
    again = pickle.loads(pickle.dumps(error))
    for each in (error, again):
        assert "***" in repr(each)
        assert "TOPSECRET" not in f"{each!r} {each.args} {''.join(traceback.format_exception(each))}"
    assert (str(again), again.args) == (str(error), error.args)


def test_errno_of_a_storage_error_is_kept() -> None:
    assert CheckpointNotFoundError(2, "gone").errno == 2


def test_causes_of_other_libraries_show_no_secret() -> None:
    secret = uuid.uuid4().hex

    def fail() -> None:
        error = FileNotFoundError("no such file")
        error.__cause__ = ValueError(f"https://h/x?sig={secret}")
        error.add_note(f"GET https://h/x?sig={secret}")
        raise StorageError("Cannot read.") from masked(error)

    with pytest.raises(StorageError) as caught:
        fail()
    shown = "".join(traceback.format_exception(caught.value))
    assert secret not in shown
    assert "MaskedError: FileNotFoundError: no such file" in shown
    assert "MaskedError: ValueError: https://h/x?sig=***" in shown
    assert "GET https://h/x?sig=***" in shown


def test_cause_without_a_secret_stays_what_it_is() -> None:
    error = FileNotFoundError("no such file")
    error.__cause__ = cause = ValueError("broken")
    assert masked(error) is error
    assert error.__cause__ is cause


@pytest.mark.parametrize("text", ["http://token@host/x", "https://host/x?jwt=SECRET", "https://host/x?code=SECRET&a=b"])
def test_a_token_in_odd_places_of_a_url_is_masked_as_well(text: str) -> None:
    assert "token@" not in mask(text)
    assert "SECRET" not in mask(text)


def test_messages_act_on_no_terminal() -> None:
    error = TorchferryError("a\x1b[2J\x07b\nc")
    error.add_note("d\u202ee")
    assert str(error) == "a\\x1b[2J\\x07b\nc"
    assert error.__notes__ == ["d\\u202ee"]


def test_the_traceback_of_a_missing_object_is_the_users(tmp_path: Path) -> None:
    """It was 101 lines long."""

    async def load() -> None:
        await torchferry.load_async(tmp_path / "missing.pt")

    with pytest.raises(CheckpointNotFoundError) as raised:
        torchferry.load(tmp_path / "missing.pt")
    lines = "".join(traceback.format_exception(raised.value)).splitlines()
    assert len(lines) < 20
    with pytest.raises(CheckpointNotFoundError) as raised:
        asyncio.run(load())
    assert len("".join(traceback.format_exception(raised.value)).splitlines()) < 60


def test_the_traceback_of_an_error_of_the_users_stays(tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("the user's")

    with pytest.raises(CheckpointNotFoundError) as raised:
        try:
            fail()
        except ValueError:
            torchferry.load(tmp_path / "missing.pt")
    context = raised.value.__context__
    assert isinstance(context, ValueError)
    assert "in fail" in "".join(traceback.format_exception(context))


def test_the_whole_traceback_is_there_for_who_debugs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="torchferry")
    with pytest.raises(CheckpointNotFoundError) as raised:
        torchferry.load(tmp_path / "missing.pt")
    assert "storage/local.py" in "".join(traceback.format_exception(raised.value))
