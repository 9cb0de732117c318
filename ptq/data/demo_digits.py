"""Which real images need no download?

The 1,797 handwritten digits that ship inside scikit-learn (8x8, 17 grey levels; Alpaydin and Kaynak, UCI Optical
Recognition of Handwritten Digits), written as an image folder that the pipeline reads like any other.
"""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from ptq.data.images import png_from_pixels, resize_pixels
from ptq.data.sampling import draw_stratified
from ptq.errors import ManifestError

VAL_IMAGES = 300
TEST_IMAGES = 497
# Written last and hidden, so that the index does not see it.
_MARKER = ".digits.json"


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """Settings under which the demo's network learns the digits to about 98 % in half a minute of one CPU core."""

    model: str
    image_size: int
    epochs: int
    batch_size: int
    learning_rate: float
    calibration_images: int


DEMO = DemoSettings(
    model="resnet18", image_size=32, epochs=10, batch_size=64, learning_rate=0.05, calibration_images=256
)


def write_digits_folder(target: Path, *, image_size: int, seed: int) -> None:
    """Write the digits to `target`, one folder per split and in it one per class, all of them or none.

    1,000 train, 300 val and 497 test images, each class in proportion. The same arguments give the same bytes.
    A complete folder is left alone; one that is incomplete or was written with other arguments is replaced.

    Args:
        target: the folder; its parents are made.
        image_size: side of the PNG files, in pixels, at least 8.
        seed: of the split.

    Raises:
        ManifestError: `target` holds something else.
    """
    settings = {"image_size": image_size, "seed": seed}
    if _is_complete(target, settings):
        return
    if target.exists() and not (target / _MARKER).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise ManifestError(
            f"{target} exists and does not hold the demo's digits. Expected nothing there; choose another folder or "
            "remove it."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    working = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        fresh = working / "digits"
        _write_images(fresh, image_size=image_size, seed=seed)
        content = settings | {"images": _images_and_bytes(fresh)}
        (fresh / _MARKER).write_text(json.dumps(content))
        if (target / _MARKER).is_file():
            os.replace(target, working / "replaced")
        try:
            os.replace(fresh, target)
        except OSError:
            # Another process was first; its folder serves if it is the same one.
            if not _is_complete(target, settings):
                raise
    finally:
        shutil.rmtree(working)


def _write_images(folder: Path, *, image_size: int, seed: int) -> None:
    digits = load_digits()
    labels = digits.target.astype(np.int64)
    split_of = np.full(len(labels), "train", dtype="<U5")
    split_of[draw_stratified(labels, images=TEST_IMAGES, seed=seed)] = "test"
    rest = np.flatnonzero(split_of == "train")
    split_of[rest[draw_stratified(labels[rest], images=VAL_IMAGES, seed=seed)]] = "val"
    for split in ("train", "val", "test"):
        for label in range(10):
            (folder / split / str(label)).mkdir(parents=True)
    for number, (image, label, split) in enumerate(zip(digits.images, labels, split_of, strict=True)):
        pixels = resize_pixels(np.rint(image * (255 / 16)).astype(np.uint8), side=image_size)
        (folder / split / str(label) / f"digit_{number:04d}.png").write_bytes(png_from_pixels(pixels))


def _is_complete(folder: Path, settings: dict[str, int]) -> bool:
    try:
        found = json.loads((folder / _MARKER).read_text())
    except (OSError, ValueError):
        return False
    return found == settings | {"images": _images_and_bytes(folder)}


def _images_and_bytes(folder: Path) -> list[int]:
    """Number of PNG files and their bytes together."""
    sizes = [path.stat().st_size for path in folder.glob("*/*/*.png")]
    return [len(sizes), sum(sizes)]
