"""Does training learn real digits, repeat itself exactly and keep the weights it says it keeps?"""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from ptq.data.images import resize_pixels
from ptq.errors import ManifestError, UsageError
from ptq.networks.training import (
    batches_of,
    evaluate_classifier,
    learning_rates,
    save_checkpoint,
    shift_images,
    train_classifier,
)

MEAN, STD = (0.5,), (0.5,)


@pytest.fixture(scope="module")
def digits():
    """600 real digits at 16x16 pixels: 400 to train on, 200 held out."""
    data = load_digits()
    chosen = np.random.default_rng(0).permutation(len(data.images))[:600]
    images = np.rint(data.images[chosen] * (255 / 16)).astype(np.uint8)
    pixels = np.stack([resize_pixels(image, side=16) for image in images])[..., np.newaxis]
    labels = data.target[chosen].astype(np.int64)
    return (pixels[:400], labels[:400]), (pixels[400:], labels[400:])


def small_network(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False),
        torch.nn.BatchNorm2d(16),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        torch.nn.BatchNorm2d(32),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Dropout(dropout),
        torch.nn.Linear(512, 10),
    )


def train(model, examples, val=None, **options):
    settings = {
        "epochs": 2, "batch_size": 32, "learning_rate": 0.1, "weight_decay": 5e-4, "augment": True, "seed": 0,
        "threads": 1, "progress": lambda epoch: None,
    }  # fmt: skip
    return train_classifier(model, train=examples, val=val, mean=MEAN, std=STD, **(settings | options))


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


def test_a_small_network_learns_real_digits(digits):
    model = small_network()
    result = train(model, *digits, epochs=6)
    assert result.val_top1_percent >= 90
    assert result.epochs[-1].train_loss < result.epochs[0].train_loss
    assert not model.training


def test_the_same_seed_gives_the_same_weights_twice(digits):
    first, second = small_network(dropout=0.2), small_network(dropout=0.2)
    assert train(first, *digits, threads=2) == train(second, *digits, threads=2)
    assert same(weights(first), weights(second))


def test_another_seed_gives_other_weights(digits):
    first, second = small_network(), small_network()
    train(first, digits[0], epochs=1)
    train(second, digits[0], epochs=1, seed=1)
    assert not same(weights(first), weights(second))


def test_the_callers_random_state_and_threads_are_given_back(digits):
    torch.manual_seed(5)
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    model = small_network()
    torch.random.set_rng_state(before)
    train(model, digits[0], epochs=1, threads=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_the_weights_kept_are_those_of_the_best_epoch_on_val(digits):
    model = small_network()
    result = train(model, *digits, epochs=4)
    best = max(epoch.val_top1_percent for epoch in result.epochs)
    assert result.kept == "best"
    assert result.epochs[result.kept_epoch - 1].val_top1_percent == best
    assert evaluate_classifier(model, digits[1], mean=MEAN, std=STD)[1] == result.val_top1_percent == best


def test_among_equally_good_epochs_the_last_is_kept(digits):
    pixels, labels = digits[0]
    model = small_network()
    # No training image is a 9 and its logit starts far down, so every epoch scores 0 % on held-out nines.
    with torch.no_grad():
        model[-1].bias[9] = -100
    nines = pixels[labels == 9], labels[labels == 9]
    result = train(model, (pixels[labels != 9], labels[labels != 9]), nines, epochs=3)
    assert [epoch.val_top1_percent for epoch in result.epochs] == [0, 0, 0]
    assert result.kept_epoch == 3


def test_arrays_mapped_from_read_only_files_can_be_trained_on(digits, tmp_path):
    mapped = []
    for name, array in zip("pl", digits[0], strict=True):
        np.save(tmp_path / f"{name}.npy", array)
        mapped.append(np.load(tmp_path / f"{name}.npy", mmap_mode="r"))
    model, expected = small_network(), small_network()
    assert train(model, tuple(mapped), tuple(mapped), epochs=1) == train(expected, digits[0], digits[0], epochs=1)
    assert same(weights(model), weights(expected))


def test_a_worse_last_epoch_is_not_kept(digits):
    model = small_network()

    def ruin_the_last_layer(epoch):
        if epoch.epoch == 2:
            with torch.no_grad():
                model[-1].weight.zero_()
                model[-1].bias.copy_(torch.arange(10.0) * 100)

    result = train(model, *digits, epochs=3, learning_rate=0.01, progress=ruin_the_last_layer)
    assert result.kept_epoch <= 2
    found = evaluate_classifier(model, digits[1], mean=MEAN, std=STD)
    assert found[1] == result.val_top1_percent > result.epochs[-1].val_top1_percent


def test_the_last_weights_are_kept_without_val(digits):
    model = small_network()
    result = train(model, digits[0])
    assert (result.kept, result.kept_epoch, result.val_top1_percent) == ("last", 2, None)


def test_progress_sees_every_epoch_once(digits):
    seen = []
    result = train(small_network(), *digits, progress=seen.append)
    assert tuple(seen) == result.epochs
    assert [(epoch.epoch, epoch.epochs) for epoch in seen] == [(1, 2), (2, 2)]


def test_a_remainder_of_one_image_is_no_batch_of_its_own(digits):
    # BatchNorm over 1x1 pixels refuses a batch of one image.
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(256, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 10)
    )
    pixels, labels = digits[0]
    result = train(model, (pixels[:65], labels[:65]), batch_size=32)
    assert math.isfinite(result.epochs[-1].train_loss)


@pytest.mark.parametrize("images", [2, 3, 5, 33, 64, 65, 127])
@pytest.mark.parametrize("batch_size", [2, 3, 32, 200])
def test_batches_are_as_even_as_can_be_and_never_of_one_image(images, batch_size):
    sizes = [len(part) for part in np.array_split(np.arange(images), batches_of(images, batch_size))]
    assert min(sizes) >= 2
    # Only where the sizes leave no other way does a batch hold one image more than asked.
    assert max(sizes) <= max(batch_size, 3)


def test_one_image_is_too_few(digits):
    pixels, labels = digits[0]
    with pytest.raises(ManifestError, match="Training has 1 images; expected at least 2"):
        train(small_network(), (pixels[:1], labels[:1]))


def test_a_label_without_an_output_is_refused(digits):
    pixels, labels = digits[0]
    with pytest.raises(ManifestError, match="labels run from 1 to 10; the model has 10 outputs.* for 11 classes"):
        train(small_network(), (pixels, labels + 1))


def test_a_loss_that_is_not_finite_is_said_with_the_learning_rate(digits):
    with pytest.raises(UsageError, match=r"the loss is (nan|inf) in epoch 1 of 2 with learning_rate 1e\+30"):
        train(small_network(), digits[0], learning_rate=1e30)


def test_evaluation_is_cross_entropy_and_top1_over_all_images(digits):
    pixels, labels = digits[1]
    model = small_network().eval()
    with torch.no_grad():
        logits = model(torch.from_numpy((pixels.astype(np.float32).transpose(0, 3, 1, 2) / 255 - 0.5) / 0.5))
    expected = float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)))
    loss, top1 = evaluate_classifier(model, digits[1], mean=MEAN, std=STD)
    # 200 images are two batches, whose float32 sums differ from one sum in the last digits.
    assert loss == pytest.approx(expected, rel=1e-5)
    assert top1 == 100 * np.mean(logits.numpy().argmax(axis=1) == labels)


def test_the_learning_rate_rises_over_the_first_three_tenths_and_ends_at_zero():
    rates = [rate for epoch in range(1, 11) for rate in learning_rates(epoch, epochs=10, steps=10, peak=0.5)]
    assert len(rates) == 100
    assert rates[29] == 0.5
    assert np.all(np.diff(rates[:30]) > 0)
    assert np.all(np.diff(rates[29:]) < 0)
    assert rates[-1] == pytest.approx(0, abs=1e-12)


def test_a_shift_moves_a_whole_image_by_at_most_an_eighth_of_its_side():
    pixels = np.zeros((200, 16, 16, 1), dtype=np.uint8)
    pixels[:, 8, 8] = 255
    shifted = shift_images(pixels, order=np.random.default_rng(0))
    images, rows, columns, _ = np.nonzero(shifted)
    assert images.tolist() == list(range(200))
    assert set(rows) == set(columns) == {6, 7, 8, 9, 10}


def test_a_shift_repeats_the_border():
    pixels = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1)

    class OneUp:
        def integers(self, low, high, *, size, endpoint):
            return np.full(size, -1)

    expected = np.pad(pixels[0, :, :, 0], ((0, 1), (0, 1)), mode="edge")[1:, 1:]
    np.testing.assert_array_equal(shift_images(pixels, order=OneUp())[0, :, :, 0], expected)


def test_a_checkpoint_loads_as_plain_weights(tmp_path):
    model = small_network()
    save_checkpoint(model, tmp_path / "new" / "model.pth")
    assert same(torch.load(tmp_path / "new" / "model.pth", weights_only=True), weights(model))


def test_a_checkpoint_can_be_safetensors(tmp_path):
    model = small_network()
    save_checkpoint(model, tmp_path / "model.safetensors")
    assert same(load_file(tmp_path / "model.safetensors"), weights(model))


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_equal_weights_give_equal_files_after_training_too(tmp_path, name, digits):
    for folder in ("a", "b"):
        model = small_network()
        train(model, digits[0], epochs=1)
        save_checkpoint(model, tmp_path / folder / name)
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "model.pth"
    save_checkpoint(small_network(), path)
    before = path.read_bytes()
    broken = small_network()
    broken.register_buffer("unsaved", torch.empty(4, device="meta"))
    with pytest.raises(NotImplementedError):
        save_checkpoint(broken, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
