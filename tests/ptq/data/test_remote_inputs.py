"""Are data in S3 read once, by content, and are wrong ones refused? Against a real server on loopback."""

import dataclasses
import hashlib
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from networks import small_resnet
from s3_servers import BUCKET, moto_server, rclone_server

from ptq.config import PreprocessingConfig
from ptq.data import decoding
from ptq.data import index as index_module
from ptq.data.remote_inputs import Inputs
from ptq.errors import ArtifactError, CheckpointError, ManifestError, UsageError
from ptq.networks.checkpoint import read_state_dict
from ptq.storage.cache import ObjectCache
from ptq.storage.local_folder import LocalFolder
from ptq.storage.s3_reader import RemoteObjects
from ptq.storage.store import Store

SPLITS = {"calibration_split": "train", "selection_split": "val", "test_split": "test"}
PIXELS = PreprocessingConfig(resize=24, crop=24)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with moto_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def bucket(server, monkeypatch, tmp_path):
    """A client of the server, whose bucket is empty and whom the environment names."""
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PTQ_CACHE_DIR", str(tmp_path / "user cache"))
    client = server.client()
    for item in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=item["Key"])
    yield client
    client.close()


@pytest.fixture
def gets(monkeypatch):
    """The keys of the objects whose bytes were asked for."""
    asked = []
    open_object = RemoteObjects._open

    def noted(self, **which):
        asked.append(which["Key"])
        return open_object(self, **which)

    monkeypatch.setattr(RemoteObjects, "_open", noted)
    return asked


@pytest.fixture
def inputs(bucket, tmp_path):
    return inputs_in(tmp_path)


def inputs_in(folder, cache="cache"):
    """Inputs of a new process: nothing in memory, the same store, a cache by name."""
    return Inputs(Store(LocalFolder(folder / "store")), cache=ObjectCache(folder / cache, limit_bytes=2**30))


def upload(client, folder, prefix):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert files
    for path in files:
        client.upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(folder).as_posix()}")


def put(client, key, body):
    client.put_object(Bucket=BUCKET, Key=key, Body=body)


@pytest.fixture
def few_images(image_folder, tmp_path):
    """Two images of each class and split, 24 in all."""
    root = tmp_path / "few images"
    for folder in image_folder.glob("*/*"):
        target = root / folder.relative_to(image_folder)
        target.mkdir(parents=True)
        for path in sorted(folder.iterdir())[:2]:
            shutil.copy(path, target)
    return root


def test_images_under_a_prefix_are_indexed_and_decoded_as_in_a_folder(bucket, inputs, few_images):
    upload(bucket, few_images, "x ray/images")
    local = index_module.index_images(str(few_images), **SPLITS)
    remote = index_module.index_images(f"s3://{BUCKET}/x ray/images/", inputs=inputs, **SPLITS)
    assert remote.table.rows() == local.table.rows()
    assert remote.root == f"s3://{BUCKET}/x ray/images"
    assert (remote.class_names, remote.splits, remote.warnings) == (local.class_names, local.splits, local.warnings)
    rows = index_module.rows_of_split_table(remote.table, "test")
    here = decoding.decode_rows(rows, root=str(few_images), preprocessing=PIXELS)
    assert (decoding.decode_rows(rows, root=remote.root, preprocessing=PIXELS, inputs=inputs) == here).all()


def test_unchanged_images_are_never_read_again(bucket, inputs, few_images, gets, tmp_path):
    upload(bucket, few_images, "images")
    first = index_module.index_images(f"s3://{BUCKET}/images", inputs=inputs, **SPLITS)
    assert len(gets) == 24
    again = inputs_in(tmp_path)
    second = index_module.index_images(f"s3://{BUCKET}/images", inputs=again, **SPLITS)
    decoding.decode_rows(
        index_module.rows_of_split_table(second.table, "test"), root=second.root, preprocessing=PIXELS, inputs=again
    )
    assert len(gets) == 24
    assert second.table.rows() == first.table.rows()


def test_only_a_replaced_image_is_read_again(bucket, inputs, few_images, gets, tmp_path):
    upload(bucket, few_images, "images")
    first = index_module.index_images(f"s3://{BUCKET}/images", inputs=inputs, **SPLITS)
    gets.clear()
    other = (few_images / "train/north-west/000.png").read_bytes()
    put(bucket, "images/test/north-east/new.png", other[:-12] + b"\0" + other[-12:])
    put(bucket, "images/train/north-west/000.png", other + b"\0")
    second = index_module.index_images(f"s3://{BUCKET}/images", inputs=inputs_in(tmp_path), **SPLITS)
    assert sorted(gets) == ["images/test/north-east/new.png", "images/train/north-west/000.png"]
    assert second.table.height == first.table.height + 1
    assert index_module.index_fingerprint(first) != index_module.index_fingerprint(second)


def test_a_machine_with_an_empty_cache_reads_at_decoding_and_knows_the_digests(
    bucket, inputs, few_images, gets, tmp_path
):
    upload(bucket, few_images, "images")
    index_module.index_images(f"s3://{BUCKET}/images", inputs=inputs, **SPLITS)
    gets.clear()
    elsewhere = inputs_in(tmp_path, cache="another cache")
    index = index_module.index_images(f"s3://{BUCKET}/images", inputs=elsewhere, **SPLITS)
    assert gets == []
    rows = index_module.rows_of_split_table(index.table, "test")
    for _ in range(2):
        decoding.decode_rows(rows, root=index.root, preprocessing=PIXELS, inputs=elsewhere)
    assert sorted(gets) == [f"images/{row.path}" for row in rows]


def test_an_image_that_changes_between_index_and_decoding_is_refused(bucket, inputs, few_images, tmp_path):
    upload(bucket, few_images, "images")
    index = index_module.index_images(f"s3://{BUCKET}/images", inputs=inputs, **SPLITS)
    rows = index_module.rows_of_split_table(index.table, "test")
    put(bucket, f"images/{rows[0].path}", (few_images / rows[1].path).read_bytes())
    elsewhere = inputs_in(tmp_path, cache="another cache")
    with pytest.raises(ManifestError, match=r"north-east/000.png has changed since it was indexed"):
        decoding.decode_rows(rows, root=index.root, preprocessing=PIXELS, inputs=elsewhere)
    bucket.delete_object(Bucket=BUCKET, Key=f"images/{rows[0].path}")
    with pytest.raises(ManifestError, match="is gone since it was indexed"):
        decoding.decode_rows(rows, root=index.root, preprocessing=PIXELS, inputs=elsewhere)


def test_a_manifest_names_images_beside_it_and_elsewhere(bucket, inputs, few_images, gets, tmp_path):
    upload(bucket, few_images, "data/images")
    upload(bucket, few_images / "test", "other/place")
    lines = [f"images/train/{name}/000.png,{name},train" for name in ("north-east", "south-west")]
    lines += [f"s3://{BUCKET}/other/place/{name}/000.png,{name},test" for name in ("north-east", "south-west")]
    put(bucket, "data/manifest.csv", "\n".join(["path,label,split", *lines]))
    index = index_module.index_images(f"s3://{BUCKET}/data/manifest.csv", inputs=inputs, **SPLITS)
    assert len(gets) == 5
    local = index_module.index_images(str(few_images), **SPLITS)
    by_path = dict(local.table.select("path", "sha256").iter_rows())
    assert [(row.label, row.sha256) for row in index_module.rows_of_split_table(index.table, "test")] == [
        (0, by_path["test/north-east/000.png"]), (1, by_path["test/south-west/000.png"])
    ]  # fmt: skip
    again = inputs_in(tmp_path)
    second = index_module.index_images(f"s3://{BUCKET}/data/manifest.csv", inputs=again, **SPLITS)
    decoding.decode_rows(
        index_module.rows_of_split_table(second.table, "test"), root=second.root, preprocessing=PIXELS, inputs=again
    )
    assert len(gets) == 5


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "images/../../x.png"])
def test_a_manifest_that_leads_out_of_its_prefix_is_refused(bucket, inputs, path):
    put(bucket, "data/manifest.csv", f"path,label,split\n{path},cat,train\n{path},cat,test\n")
    with pytest.raises(ManifestError, match="leads out of s3://models/data"):
        index_module.index_images(f"s3://{BUCKET}/data/manifest.csv", inputs=inputs, **SPLITS)


@pytest.mark.parametrize(
    ("uri", "error", "message"),
    [
        (f"s3://{BUCKET}/nothing", ManifestError, "there are no folders with images under it"),
        (f"s3://{BUCKET}/none.csv", ManifestError, "there is no such object"),
        ("s3://no-such-bucket/images", ArtifactError, "there is no bucket no-such-bucket"),
        (f"s3://{BUCKET}/images?addressing=path", UsageError, "without options"),
        (f"s3://user:hidden@{BUCKET}/images", UsageError, "credentials from boto3"),
    ],
)
def test_what_cannot_be_data_is_refused_with_its_reason(bucket, inputs, uri, error, message):
    with pytest.raises(error, match=message) as raised:
        index_module.index_images(uri, inputs=inputs, **SPLITS)
    assert "hidden" not in str(raised.value)


def test_refused_access_is_told_without_secrets(tmp_path, monkeypatch):
    with rclone_server(tmp_path / "server") as strict:
        client = strict.client()
        put(client, "weights.pth", b"x")
        client.close()
        for name, value in strict.environment(secret="wrong-secret").items():
            monkeypatch.setenv(name, value)
        inputs = inputs_in(tmp_path)
        with pytest.raises(ArtifactError, match=r"weights.pth may not be read at http://127.0.0.1:\d+ \(") as raised:
            inputs.checkpoint_digest(f"s3://{BUCKET}/weights.pth")
        assert "wrong-secret" not in str(raised.value)
        with pytest.raises(ArtifactError, match="may list the bucket and get its objects"):
            index_module.index_images(f"s3://{BUCKET}/images", inputs=inputs, **SPLITS)


def test_a_checkpoint_is_read_once_and_loads_as_from_a_file(bucket, inputs, gets, tmp_path):
    path = tmp_path / "small.pth"
    torch.save(small_resnet().state_dict(), path)
    put(bucket, "small.pth", path.read_bytes())
    uri = f"s3://{BUCKET}/small.pth"
    assert inputs.checkpoint_digest(uri) == hashlib.sha256(path.read_bytes()).hexdigest()
    again = inputs_in(tmp_path)
    with again.checkpoint(uri) as file:
        found = read_state_dict(file)
    again.checkpoint_digest(uri)
    assert gets == ["small.pth"]
    assert all(torch.equal(found[key], value) for key, value in read_state_dict(path).items())


def test_a_checkpoint_replaced_by_another_of_the_same_size_is_noticed(bucket, inputs, gets):
    uri = f"s3://{BUCKET}/small.pth"
    put(bucket, "small.pth", b"a" * 1000)
    first = inputs.checkpoint_digest(uri)
    put(bucket, "small.pth", b"b" * 1000)
    assert inputs.checkpoint_digest(uri) != first
    assert inputs.local_path(uri).read_bytes() == b"b" * 1000
    assert len(gets) == 2


def test_a_checkpoint_whose_copy_is_gone_or_damaged_is_read_again(bucket, inputs, gets):
    uri = f"s3://{BUCKET}/small.pth"
    put(bucket, "small.pth", b"a" * 1000)
    inputs.local_path(uri).unlink()
    inputs.local_path(uri).write_bytes(b"damaged")
    assert inputs.local_path(uri).read_bytes() == b"a" * 1000
    assert len(gets) == 3


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (f"s3://{BUCKET}/none.pth", f"Checkpoint s3://{BUCKET}/none.pth does not exist"),
        (f"s3://{BUCKET}/weights.zip", r'ends in ".zip". Expected one of .pth'),
        (f"s3://{BUCKET}/broken.pth", f"Checkpoint s3://{BUCKET}/broken.pth .* holds no weights"),
    ],
)
def test_what_cannot_be_a_checkpoint_is_refused_by_its_uri(bucket, inputs, uri, message):
    put(bucket, "broken.pth", b"no checkpoint")
    with pytest.raises(CheckpointError, match=message), inputs.checkpoint(uri) as file:
        read_state_dict(file)


HOSTILE = [
    "images/train/cat/../../../../escaped.png", "images/train/cat//etc/passwd.png",
    "images/train/cat/line\nbreak.png", f"images/train/cat/{'long' * 230}.png",
    "images/train/cat/-rf ~;$(touch x).png", "images/../../up/cat.png",
]  # fmt: skip


def test_hostile_keys_name_no_file_outside_cache_and_store(bucket, inputs, few_images, tmp_path, monkeypatch):
    """The server refuses some of these keys that S3 takes, so they are renamed on the way from it."""
    image = (few_images / "train/north-west/000.png").read_bytes()
    kept = {f"images/train/cat/{number}.png": key for number, key in enumerate(HOSTILE)}
    for number, key in enumerate([*kept, "images/test/cat/1.png"]):
        put(bucket, key, image + bytes([number]))
    listed, opened = RemoteObjects.listed, RemoteObjects._open
    plain = {hostile: key for key, hostile in kept.items()}
    monkeypatch.setattr(
        RemoteObjects,
        "listed",
        lambda self, *where: [
            dataclasses.replace(each, key=kept.get(each.key, each.key)) for each in listed(self, *where)
        ],
    )
    monkeypatch.setattr(
        RemoteObjects,
        "_open",
        lambda self, **which: opened(self, **{**which, "Key": plain.get(which["Key"], which["Key"])}),
    )
    before = files_in(tmp_path)
    index = index_module.index_images(f"s3://{BUCKET}/images", inputs=inputs, **SPLITS)
    rows = index_module.rows_of_split_table(index.table, "train")
    decoding.decode_rows(rows, root=index.root, preprocessing=PIXELS, inputs=inputs)
    assert len(rows) == 4
    made = files_in(tmp_path) - before
    assert made
    assert all(path.split("/")[0] in ("cache", "store") for path in made)
    assert all(re.fullmatch(r"[0-9a-f]{64}(\.json)?", path.split("/")[-1]) for path in made)


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_many_readers_at_once_share_one_cache(bucket, few_images, gets, tmp_path):
    upload(bucket, few_images, "images")

    def index(number):
        found = index_module.index_images(f"s3://{BUCKET}/images", inputs=inputs_in(tmp_path), **SPLITS)
        return index_module.index_fingerprint(found)

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(index, range(4)))) == 1
    assert list((tmp_path / "cache").glob(".*")) == []
