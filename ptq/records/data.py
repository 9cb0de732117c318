"""What was found about images: the splits, what was prepared of them, and a training on them?"""

from dataclasses import dataclass

from ptq.records.base import ArtifactRef


@dataclass(frozen=True, slots=True)
class SplitCount:
    """How many images of each class a split holds; `images_per_class` is in the order of the data's classes."""

    split: str
    images: int
    images_per_class: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DataRecord:
    """The indexed images. `table` is Parquet: path, label (class index), split, sha256 of the file."""

    table: ArtifactRef
    root: str
    class_names: tuple[str, ...]
    has_named_classes: bool
    splits: tuple[SplitCount, ...]
    duplicates_across_splits: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PreparedImages:
    """Decoded, resized and cropped images of one purpose: `pixels` is uint8 (n, h, w, c), `labels` int64 (n,)."""

    pixels: ArtifactRef
    labels: ArtifactRef
    images: int
    sha256_of_files: ArtifactRef


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """A trained checkpoint and its top-1 on the held-out split, None where there was none."""

    checkpoint: ArtifactRef
    held_out_top1_percent: float | None
