import json

import pytest
from command_line import quantize


@pytest.mark.slow
def test_a_published_model_has_a_history_that_can_be_restored_and_a_store_to_clean(
    run, checkpoint, image_folder, tmp_path
):
    store = tmp_path / "store"
    for more in ([], ["--weight-method", "mse"]):
        code, _, err = run(*quantize(checkpoint, image_folder, tmp_path, *more))
        assert code == 0, err
    code, out, _ = run("history", "small", "--store", store, "--json")
    first, second = json.loads(out)["versions"]
    assert code == 0
    assert second["replaced"] == first["version"]
    assert first["checkpoint_sha256"] == second["checkpoint_sha256"]
    assert first["config_sha256"] != second["config_sha256"]
    assert first["data_sha256"] == first["objects"]["images.parquet"]["sha256"]
    assert {"code_sha256", "versions", "published_at", "top1_percent", "fp32_top1_percent", "drop_pp"} <= set(first)
    code, out, _ = run("restore", "small", first["version"][:8], "--store", store)
    assert (code, first["version"] in out) == (0, True)
    code, out, _ = run("history", "small", "--store", store)
    assert (code, out.count(first["version"])) == (0, 5)
    code, out, _ = run("gc", "--store", store, "--json")
    assert (code, json.loads(out)["is_dry_run"]) == (0, True)
    code, out, _ = run("gc", "--store", store, "--delete")
    assert (code, "Removed" in out) == (0, True)


def test_history_and_restore_of_what_is_not_there_are_wrong_usage(run, tmp_path):
    (tmp_path / "store" / "objects").mkdir(parents=True)
    code, _, err = run("history", "small", "--store", tmp_path / "store")
    assert (code, "The models there are: none" in err) == (2, True)
    code, _, err = run("restore", "small", "aa", "--store", tmp_path / "store")
    assert code == 2


@pytest.mark.parametrize("command", [("history", "small"), ("restore", "small", "aa"), ("gc", "--delete")])
def test_a_store_that_does_not_exist_is_wrong_usage_and_is_not_created(run, tmp_path, command):
    code, _, err = run(*command, "--store", tmp_path / "stroe")
    assert (code, "stroe does not exist. Expected the store of an earlier run." in " ".join(err.split())) == (2, True)
    assert not (tmp_path / "stroe").exists()
