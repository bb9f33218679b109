"""Messages say what a user needs, and nothing that is nobody else's business."""

from __future__ import annotations

import pytest

from torchferry import StorageError


@pytest.mark.parametrize(
    "text",
    [
        "Cannot read ftp://ferry:TOPSECRET@host/x.pt: broken.",
        "Cannot read https://host/x.pt?X-Amz-Date=1&X-Amz-Signature=TOPSECRET: broken.",
        "GET https://host/tokeninfo?access_token=TOPSECRET failed",
        "https://account.blob.core.windows.net/c/x.pt?sv=2024&sig=TOPSECRET&se=2026",
    ],
)
def test_no_message_shows_the_secrets_of_a_url(text: str) -> None:
    assert str(StorageError(text)) == text.replace("TOPSECRET", "***")


def test_what_is_no_secret_is_shown() -> None:
    text = "s3://bucket/a:b@c.pt?versionId=1&tokens=2 at http://127.0.0.1:8080/x and file:///a@b: broken."
    assert str(StorageError(5, text)) == text
