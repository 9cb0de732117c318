"""Is what AWS S3, MinIO and EventBridge send of a bucket's events understood, and nothing else?"""

import json

import pytest

from ptq.errors import UsageError
from ptq.service.bucket_notifications import created_objects


def aws(key="in/digits/a.pth", name="ObjectCreated:Put", bucket="models", **more):
    """A record as AWS S3 sends it, shortened to what a reader may look at."""
    return {
        "eventVersion": "2.1", "eventSource": "aws:s3", "awsRegion": "eu-central-1", "eventName": name,
        "s3": {
            "s3SchemaVersion": "1.0", "configurationId": "new checkpoints", "bucket": {"name": bucket},
            "object": {"key": key, "size": 1024, "eTag": "0" * 32, "sequencer": "0A1B2C3D4E5F678901", **more},
        },
    }  # fmt: skip


def minio(key="in%2Fdigits%2Fa.pth", name="s3:ObjectCreated:Put"):
    """What MinIO sends to a webhook."""
    record = aws(key, name, contentType="application/octet-stream")
    record["eventSource"] = "minio:s3"
    return {"EventName": name, "Key": f"models/{key}", "Records": [record]}


def event_bridge(key="in/digits/a.pth", kind="Object Created"):
    """What EventBridge sends, whose keys are plain."""
    detail = {"version": "0", "bucket": {"name": "models"}, "object": {"key": key, "size": 5}, "reason": "PutObject"}
    return {"version": "0", "detail-type": kind, "source": "aws.s3", "region": "eu-central-1", "detail": detail}


def read(content):
    return created_objects(json.dumps(content).encode())


@pytest.mark.parametrize(
    ("content", "uris"),
    [
        ({"Records": [aws()]}, ("s3://models/in/digits/a.pth",)),
        ({"Records": [aws(versionId="3HL4kqtJvjVBH40Nrjfkd")]}, ("s3://models/in/digits/a.pth",)),
        ({"Records": [aws("in/x+ray/%C3%A4%2Bb%20c.pth")]}, ("s3://models/in/x ray/ä+b c.pth",)),
        ({"Records": [aws("a.pth", "ObjectCreated:CompleteMultipartUpload")]}, ("s3://models/a.pth",)),
        ({"Records": [aws("b.pth"), aws("a.pth", "ObjectCreated:Copy"), aws("b.pth")]},
         ("s3://models/b.pth", "s3://models/a.pth")),
        (minio(), ("s3://models/in/digits/a.pth",)),
        (minio("in%2Fx+ray%2Fa%2Bb.pth"), ("s3://models/in/x ray/a+b.pth",)),
        (event_bridge(), ("s3://models/in/digits/a.pth",)),
        (event_bridge("in/x+ray/100%25.pth"), ("s3://models/in/x+ray/100%25.pth",)),
    ],
)  # fmt: skip
def test_created_objects_are_named_by_their_uri(content, uris):
    assert read(content) == uris


@pytest.mark.parametrize(
    "content",
    [
        {"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "models", "RequestId": "x"},
        {"Records": []},
        {"Records": [aws(name="ObjectRemoved:Delete"), aws(name="ObjectRestore:Completed")]},
        minio(name="s3:ObjectRemoved:Delete"),
        minio(name="s3:ObjectAccessed:Get"),
        event_bridge(kind="Object Deleted"),
    ],
)
def test_tests_and_deletions_name_none(content):
    assert read(content) == ()


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b"", "is no JSON"),
        (b"not json", "is no JSON: b'not json'"),
        (b"[" * 100_000, "is no JSON"),
        (b"\xff\xfe{", "is no JSON"),
        (b"[]", "is a list, not an object"),
        (b"null", "is a NoneType"),
        (b"{}", "has the fields none"),
        (b'{"records": []}', "has the fields records"),
        (b'{"Records": {}}', "has the fields Records"),
        (b'{"Records": [7]}', "has no eventName"),
        (b'{"Records": [{"eventName": 7}]}', "has no eventName"),
        (b'{"Records": [{"eventName": "ObjectCreated:Put"}]}', "has no s3"),
        (json.dumps({"Records": [aws(bucket="")]}).encode(), "names the bucket ''"),
        (json.dumps({"Records": [aws(bucket="a/b")]}).encode(), "names the bucket 'a/b'"),
        (json.dumps({"Records": [aws(key="")]}).encode(), "names the bucket 'models' and the key ''"),
        (json.dumps({"Records": [aws(key="%FF.pth")]}).encode(), "which is no UTF-8"),
        (json.dumps(event_bridge("\ud800.pth")).encode(), "which is no UTF-8"),
        (b'{"detail-type": "Object Created"}', "has no bucket"),
        (b'{"Type": "Notification", "Message": "{}"}', "has the fields Message, Type"),
    ],
)  # fmt: skip
def test_what_is_no_notification_is_refused_and_says_what_was_found(body, found):
    with pytest.raises(UsageError) as refused:
        created_objects(body)
    assert found in str(refused.value)
    assert "Expected what AWS S3 or MinIO send" in str(refused.value)
