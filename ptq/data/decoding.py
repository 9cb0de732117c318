"""How do rows of an index become pixels in a file?"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ptq.config import Decoding, PreprocessingConfig
from ptq.data.image_folders import tree_at
from ptq.data.images import decode_image
from ptq.data.index import ImageRow
from ptq.data.remote_inputs import Inputs
from ptq.errors import ManifestError
from ptq.records.base import Progress


def decode_rows(
    rows: Sequence[ImageRow],
    *,
    root: str,
    preprocessing: PreprocessingConfig | Decoding,
    progress: Progress | None = None,
    workers: int = 0,
    inputs: Inputs | None = None,
) -> np.ndarray:
    """Read, verify and decode the images of `rows`.

    Args:
        rows: the images, in the order of the result.
        root: the folder, or the s3:// URI, their paths are relative to.
        preprocessing: how each is resized and cropped.
        progress: called with the number of images decoded and the number of all.
        workers: threads; 0 for one per core, and for more where most of the time is waiting for a server.
        inputs: reads what is in S3; None for the user's cache alone.

    Returns:
        Pixels, uint8 (n, h, w, c).

    Raises:
        ManifestError: a file is gone, damaged, or no longer the one that was indexed.
    """
    side = preprocessing.crop
    tree = tree_at(root, inputs)
    pixels = np.empty((len(rows), side, side, preprocessing.channels), dtype=np.uint8)

    def decode(position: int) -> None:
        row = rows[position]
        data = tree.read(row.path, row.sha256)
        found = hashlib.sha256(data).hexdigest()
        if found != row.sha256:
            raise ManifestError(
                f"Image {row.path} has changed since it was indexed: its SHA-256 begins with {found[:12]}, expected "
                f"{row.sha256[:12]}. Run again once nothing writes to {root}."
            )
        pixels[position] = decode_image(data, preprocessing=preprocessing, source=row.path)

    with ThreadPoolExecutor(workers or tree.readers) as pool:
        for done, _ in enumerate(pool.map(decode, range(len(rows))), start=1):
            if progress:
                progress(done, len(rows))
    return pixels
