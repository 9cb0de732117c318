"""Does a whole run work with checkpoint and images in a bucket, and read again only what changed?"""

import shutil
from pathlib import Path

import networks
import pytest
import torch
from s3_servers import BUCKET, moto_server

from flows.quantize_model import quantize_model
from flows.train_model import train_model
from ptq.api import evaluate_file, export_files
from ptq.config import DataConfig, PreprocessingConfig, PtqConfig, TrainingConfig
from ptq.data import decoding
from ptq.errors import CheckpointError
from ptq.storage.s3_reader import RemoteObjects
from ptq.storage.store import open_store

pytestmark = pytest.mark.usefixtures("prefect_backend")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with moto_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server, image_folder):
    """A client of the server, in whose bucket the images are."""
    client = server.client()
    for path in sorted(image_folder.rglob("*.png")):
        client.upload_file(str(path), BUCKET, f"images/{path.relative_to(image_folder).as_posix()}")
    yield client
    client.close()


@pytest.fixture
def bucket(server, client, monkeypatch, tmp_path):
    """That client; the server is the one of this process, its cache is empty, and the checkpoint is the first one."""
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PTQ_CACHE_DIR", str(tmp_path / "cache"))
    put_checkpoint(client, tmp_path, seed=0)
    return client


def put_checkpoint(client, folder, *, seed):
    """Upload a checkpoint that differs between seeds, and return its size in bytes."""
    state = {
        name: value + seed / 100 if value.is_floating_point() else value
        for name, value in networks.small_resnet().state_dict().items()
    }
    torch.save(state, folder / "small.pth")
    client.upload_file(str(folder / "small.pth"), BUCKET, "checkpoints/small.pth")
    return (folder / "small.pth").stat().st_size


@pytest.fixture
def work(monkeypatch):
    """The keys of the objects that were read, and the images that were decoded."""
    done = {"read": [], "decoded": []}
    open_object, decode_image = RemoteObjects._open, decoding.decode_image

    def noted_open(self, **which):
        done["read"].append(which["Key"])
        return open_object(self, **which)

    def noted_decode(data, **options):
        done["decoded"].append(options["source"])
        return decode_image(data, **options)

    monkeypatch.setattr(RemoteObjects, "_open", noted_open)
    monkeypatch.setattr(decoding, "decode_image", noted_decode)
    return done


def config_in(directory, store, images=f"s3://{BUCKET}/images"):
    return PtqConfig.model_validate(
        {
            "model": {
                "name": "networks:SmallResNet", "checkpoint": f"s3://{BUCKET}/checkpoints/small.pth",
                "publish_as": "small",
            },
            "data": {"path": str(images), "preprocessing": {"resize": 24, "crop": 24}},
            "calibration": {"trials": 1, "images": 16, "methods": ["max"]},
            "engine": {"name": "openvino", "threads": 1},
            "benchmark": {"batch_sizes": [1], "duration_s": 0.05, "warmup_ms": 1.0, "rounds": 2},
            "gate": {"max_drop_pp": 100, "min_speedup_fp32": 0.0, "max_slowdown": 1000},
            "output": {"store": store, "directory": str(directory / "output")},
        }
    )  # fmt: skip


def run(config, work):
    """One run: the stages it computed, and what it read and decoded."""
    for done in work.values():
        done.clear()
    result = quantize_model(config)
    assert result.accepted
    notes = open_store(config.output.store).run_stages(result.run_id)
    assert len(notes) >= 10
    return {note["stage"] for note in notes if not note["cached"]}


@pytest.mark.slow
def test_only_what_changed_in_the_bucket_is_read_and_computed_again(bucket, work, tmp_path, image_folder):
    config = config_in(tmp_path, f"s3://{BUCKET}/store")
    images = {f"images/{path.relative_to(image_folder).as_posix()}" for path in image_folder.rglob("*.png")}

    assert "index_images" in run(config, work)
    assert sorted(work["read"]) == sorted([*images, "checkpoints/small.pth"])

    assert run(config, work) == set()
    assert work == {"read": [], "decoded": []}

    replaced = min(key for key in images if key.startswith("images/test/"))
    image = (image_folder / replaced.removeprefix("images/")).read_bytes()
    bucket.put_object(Bucket=BUCKET, Key=replaced, Body=image + b"\0")
    computed = run(config, work)
    assert work["read"] == [replaced]
    assert "index_images" in computed
    assert not computed & {"collect_statistics", "prepare_model", "compute_amax"}

    shutil.rmtree(tmp_path / "cache")
    assert run(config, work) == set()
    assert work == {"read": [], "decoded": []}


@pytest.mark.slow
def test_a_checkpoint_of_the_same_size_with_other_weights_is_noticed(bucket, work, image_folder, tmp_path):
    config = config_in(tmp_path, f"file://{tmp_path / 'store'}", image_folder)
    size = (tmp_path / "small.pth").stat().st_size
    run(config, work)
    assert put_checkpoint(bucket, tmp_path, seed=1) == size
    computed = run(config, work)
    assert work["read"] == ["checkpoints/small.pth"]
    assert "prepare_model" in computed
    assert not computed & {"index_images", "prepare_split"}


@pytest.mark.slow
def test_the_other_commands_read_checkpoints_from_the_bucket_too(bucket, tmp_path, image_folder):
    uri = f"s3://{BUCKET}/checkpoints/small.pth"
    local = str(tmp_path / "small.pth")
    sized = PreprocessingConfig(resize=24, crop=24)
    data = DataConfig(path=str(image_folder), preprocessing=sized)
    found = [
        evaluate_file(path, name="networks:SmallResNet", data=data, split="test", engine="openvino", threads=1)
        for path in (uri, local)
    ]
    assert found[0].to_json() == found[1].to_json()
    written = [
        export_files(
            path,
            name="networks:SmallResNet",
            precision="fp32",
            batch_sizes=[],
            input_shape=(3, 24, 24),
            directory=tmp_path / folder,
        )  # fmt: skip
        for path, folder in ((uri, "remote"), (local, "local"))
    ]
    remote, beside = ([Path(path).read_bytes() for path in paths] for paths in written)
    assert remote == beside
    trained = [
        train_model(
            TrainingConfig(
                model="networks:SmallResNet",
                data=data,
                epochs=1,
                checkpoint=path,
                output=str(tmp_path / name / "t.pth"),
            ),
            store=str(tmp_path / name),
            threads=1,
        )  # fmt: skip
        for path, name in ((uri, "from-bucket"), (local, "from-file"))
    ]
    assert trained[0].checkpoint.sha256 == trained[1].checkpoint.sha256


@pytest.mark.parametrize("command", [evaluate_file, export_files])
def test_a_checkpoint_that_the_bucket_lacks_is_named(bucket, tmp_path, image_folder, command):
    options = {
        evaluate_file: {
            "data": DataConfig(path=str(image_folder)),
            "split": "test",
            "engine": "openvino",
            "threads": 1,
        },
        export_files: {"precision": "fp32", "batch_sizes": [], "input_shape": (3, 24, 24), "directory": tmp_path},
    }
    with pytest.raises(CheckpointError, match=f"Checkpoint s3://{BUCKET}/absent.pth does not exist"):
        command(f"s3://{BUCKET}/absent.pth", name="resnet18", **options[command])
