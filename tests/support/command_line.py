"""The `ptq` command in tests: a small job, and what must be said where one fails."""

SIZE = ["--resize", 24, "--crop", 24]


def quantize(checkpoint, images, directory, *more):
    # What is measured here is the command, not the model.
    (directory / "quick.yaml").write_text("benchmark: {duration_s: 0.05, warmup_ms: 1.0}\n")
    return [
        "quantize", "--config", directory / "quick.yaml", "--model", "networks:SmallResNet", "--checkpoint", checkpoint,
        "--data", images, *SIZE, "--method", "max", "--trials", 1, "--calibration-images", 8,
        "--engine", "openvino", "--threads", 1, "--batch-size", 1, "--max-drop", 100, "--min-speedup", 0,
        "--publish-as", "small", "--store", directory / "store", "--output", directory / "out", *more,
    ]  # fmt: skip


def assert_says(result, code, *parts):
    found, _, err = result
    assert "Traceback" not in err
    message = " ".join(err.split())
    for part in parts:
        assert part in message, message
    assert found == code
