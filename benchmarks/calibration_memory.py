"""Does the memory of a calibration grow with the number of images?

Each count of images is calibrated by a process of its own, which reads prepared files as a run does: the FP32 graph,
the placement and the pixels, memory-mapped. Its peak is the resident memory that Linux saw (VmHWM; `getrusage` would
give the parent's peak where that is larger). Mapped pages of the pixel file count there too, although the system
takes them back when it needs memory; so the peak of the memory that the process itself asked for (anonymous pages,
sampled ten times a second) is given beside it. Where the data has fewer images than asked for, they are repeated.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.subject import Subject, arguments, temporary_subject, write_result
from ptq.calibration.calibrate import statistics_from_files
from ptq.data import decoding
from ptq.data import index as index_module
from ptq.quantization.prepared import plan_from_file

COUNTS = (64, 512, 2048)


def write_pixels(subject: Subject, count: int) -> int:
    """Writes the pixels of `count` images, repeated if there are fewer, and returns how many differ."""
    rows = index_module.rows_of_split_table(subject.index.table, "train")[:count]
    pixels = decoding.decode_rows(rows, root=str(subject.index.root), preprocessing=subject.preprocessing)
    np.save(subject.directory / "pixels.npy", np.resize(pixels, (count, *pixels.shape[1:])))
    names = [[str(index), ""] for index in range(count)]
    (subject.directory / "files.json").write_text(json.dumps(names))
    return len(rows)


def memory_mib(field: str) -> float:
    """Returns a field of Linux's account of this process in MiB: RssAnon is without mapped files, VmHWM the peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status).group(1)) / 1024


def child(options: argparse.Namespace) -> None:
    """Calibrates and prints the peaks as JSON."""
    peaks = [memory_mib("RssAnon")]
    statistics_from_files(
        observed_onnx=options.directory / "model_observed.onnx",
        plan=plan_from_file(options.directory / "placement.json"),
        pixels=options.directory / "pixels.npy",
        files=options.directory / "files.json",
        draws=[range(options.images)],
        mean=options.mean,
        std=options.std,
        bins=4096,
        threads=options.threads,
        progress=lambda done, total: peaks.append(memory_mib("RssAnon")),
    )
    print(json.dumps({"peak_mib": memory_mib("VmHWM"), "anonymous_peak_mib": max(peaks), "before_mib": peaks[0]}))


def measure(subject: Subject, count: int, threads: int) -> dict[str, float]:
    """Returns the peaks of a new process that calibrates on `count` images."""
    command = [
        sys.executable, "-m", "benchmarks.calibration_memory", "--child", "--directory", str(subject.directory),
        "--images", str(count), "--threads", str(threads),
        "--mean", *map(str, subject.preprocessing.mean), "--std", *map(str, subject.preprocessing.std),
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if "--child" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--child", action="store_true")
        parser.add_argument("--directory", type=Path)
        parser.add_argument("--images", type=int)
        parser.add_argument("--threads", type=int)
        parser.add_argument("--mean", type=float, nargs="+")
        parser.add_argument("--std", type=float, nargs="+")
        child(parser.parse_args())
        return
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    subject = temporary_subject(options)
    different = write_pixels(subject, max(COUNTS))
    rows = []
    for count in COUNTS:
        rows.append({"images": count, "different_images": min(count, different)})
        rows[-1] |= measure(subject, count, options.threads)
        print(rows[-1])
    least, most = rows[0], rows[-1]
    found = {
        "counts": rows,
        "anonymous_growth_mib": most["anonymous_peak_mib"] - least["anonymous_peak_mib"],
        "growth_mib": most["peak_mib"] - least["peak_mib"],
        "pixel_file_mib": (subject.directory / "pixels.npy").stat().st_size / 2**20,
    }
    print({key: value for key, value in found.items() if key != "counts"})
    write_result(options, "calibration_memory", found)


if __name__ == "__main__":
    main()
