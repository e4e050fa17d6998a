import pytest

from megavlm.errors import StorageError
from megavlm.redact import tree_without_secrets, without_secrets


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("https://user:pass@host/path", "https://***@host/path"),
        ("see s3://AKIA:ab/cd+ef@bucket/run, say", "see s3://***@bucket/run, say"),
        ("s3://AKIA:12/cd@bucket/run", "s3://***@bucket/run"),
        ("https://token@host:443/a", "https://***@host:443/a"),
        ("https://host/a?X-Amz-Signature=abc&b=c", "https://host/a?***"),
        ("https://host/a#token=abc", "https://host/a?***"),
        ("'ftp://u:p@h' and \"http://u:p@h\"", "'ftp://***@h' and \"http://***@h\""),
        ("a=s3://u:p@b,c=HTTPS://v:q@d", "a=s3://***@b,c=HTTPS://***@d"),
        ("simplecache::s3://u:p@b/c", "simplecache::s3://***@b/c"),
        # Nothing to hide.
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/"),
        ("http://host:80, me@home", "http://host:80, me@home"),
        ("s3://bucket/run@2/step-1", "s3://bucket/run@2/step-1"),
        ("me@home: why? #1", "me@home: why? #1"),
    ],
)
def test_urls_tell_no_credentials(text, told):
    assert without_secrets(text) == told
    assert without_secrets(told) == told


def test_plain_data_and_errors():
    tree = {"s3://u:p@b": ["x://u:p@h", 1, None, ("y://t@h",)]}
    assert tree_without_secrets(tree) == {"s3://***@b": ["x://***@h", 1, None, ["y://***@h"]]}
    assert str(StorageError("cannot list s3://u:p@b")) == "cannot list s3://***@b"
