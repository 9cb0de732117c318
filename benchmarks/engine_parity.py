"""Is a sound graph of any family said to be sound, and one that saturates to saturate?

Each network of `family_networks` is quantized with weights whose sums of two products fit 16 bits (`portable`) and with
weights as they are (`native`), then the file is held against what was decided, and the engine against its file, as
every run does it. On a processor without VNNI `portable` must raise no alarm, and an alarm of `native` must name
saturation. Weights are random, so is what the images show: what counts is the difference between engine and file.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.families import METADATA, Network
from benchmarks.family_networks import FAMILIES, MEAN, STD
from benchmarks.subject import write_result
from ptq.calibration.amax_tables import amax_table
from ptq.calibration.calibrate import statistics_from_files
from ptq.config import QuantizationConfig
from ptq.data.images import network_input
from ptq.engines import open_engine
from ptq.engines.isa import current_isa
from ptq.evaluation.parity import IMAGES, measure_parity
from ptq.files import npy_from_array
from ptq.graph.against_plan import Decisions, difference_in_file
from ptq.graph.candidate import write_candidate
from ptq.graph.pair_sums import limit_pair_sums
from ptq.quantization.prepare_torch import write_template
from ptq.records.base import to_jsonable

BATCH = 16


def compared(network: Network) -> dict[str, Any]:
    """The parity of a network's portable and native graph, and the seconds that each comparison took."""
    prepared, pixels = network.prepare(QuantizationConfig()), network.pixels()
    (network.directory / "pixels.npy").write_bytes(npy_from_array(pixels))
    (network.directory / "files.json").write_text(json.dumps([[str(index), ""] for index in range(len(pixels))]))
    (trial,) = statistics_from_files(
        observed_onnx=prepared.files["observed_onnx"], plan=prepared.plan, pixels=network.directory / "pixels.npy",
        files=network.directory / "files.json", draws=[range(len(pixels))], mean=MEAN, std=STD, bins=4096, threads=0,
    )  # fmt: skip
    amax = amax_table(trial.histograms, plan=prepared.plan, dialect="cpu", method="percentile", percentile=99.99)
    native = network.directory / "native_template.onnx"
    write_template(
        native, weights=prepared.files["weights"], plan=prepared.plan, name=network.name,
        num_classes=prepared.num_classes, input_shape=(3, network.side, network.side),
    )  # fmt: skip
    portable = network.directory / "portable_template.onnx"
    limit_pair_sums(native, portable, plan=prepared.plan)
    images, engine = network_input(pixels[:IMAGES], mean=MEAN, std=STD), open_engine("openvino", threads=0)
    batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]

    def logits(path: Path, precision: str) -> np.ndarray:
        return np.concatenate(
            list(engine.logits(path, batches, precision=precision, batch_size=BATCH, float_remainder="fp32"))
        )

    fp32, found = logits(network.path("fp32"), "fp32"), {"side": network.side}
    for name, template in (("portable", portable), ("native", native)):
        graph = network.directory / f"{name}.onnx"
        write_candidate(template, graph, plan=prepared.plan, dialect="cpu", activation_amax=amax, metadata=METADATA)
        int8, started = logits(graph, "int8"), time.perf_counter()
        decided = Decisions(plan=prepared.plan, dialect="cpu", amax=amax, biases={})
        parity = measure_parity(
            graph, images, fp32_logits=fp32, engine_logits=int8, engine=engine, threads=0, batch_size=BATCH,
            float_remainder="fp32", difference=difference_in_file(graph, network.path("fp32"), decided),
        )  # fmt: skip
        found[name] = {**to_jsonable(parity), "seconds": time.perf_counter() - started}
    return found


def main() -> None:
    """Compares the networks one after the other and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="*", default=[name for names in FAMILIES.values() for name in names])
    parser.add_argument("--side", type=int, default=0, help="side of the images; 0: that of `family_networks`")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.calibration_images, options.data, options.name, options.model = IMAGES, "", "", ""
    networks: dict[str, Any] = {}
    for name in options.networks:
        with tempfile.TemporaryDirectory() as directory:
            settings = argparse.Namespace(**vars(options), directory=Path(directory))
            networks[name] = compared(Network(name, settings))
        for kind in ("portable", "native"):
            item = networks[name][kind]
            engine, file, parting = item["engine"]["sqnr_db"], item["file"]["sqnr_db"], item["parting"]
            print(f"{name:40} {kind:9} engine {engine:6.1f} file {file:6.1f} dB {item['seconds']:6.1f} s ", end="")
            print(parting["sentence"] if parting else "", flush=True)
        write_result(options, "engine_parity", {"isa": current_isa(), "networks": networks})
    alarms = [name for name, item in networks.items() if item["portable"]["parting"]]
    causes = {name: item["native"]["parting"]["cause"] for name, item in networks.items() if item["native"]["parting"]}
    print(f"{len(networks)} networks under {current_isa()}: {', '.join(alarms) or 'no'} alarm on portable graphs")
    print(f"on native graphs: {causes}")


if __name__ == "__main__":
    main()
