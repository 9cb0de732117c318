"""Do PyTorch, ONNX Runtime and OpenVINO agree on the same fake-quantized network?

Per dialect: cosine per image and top-1 agreement between the fake-quantized PyTorch model and the exported graph
in ONNX Runtime (optimization off) and in OpenVINO. Beside it the PyTorch model against itself with other float
kernels: no export can agree better than the model agrees with itself.
"""

import numpy as np
import torch

from benchmarks.subject import arguments, temporary_subject, write_result
from ptq.engines import open_engine
from ptq.networks.fake_quant import exportable_fake_quant, fake_quant_from_folded, weight_amax
from ptq.networks.network import NetworkKind, network_from_weights
from ptq.numerics.metrics import cosine_per_image, sqnr_db


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--test-images", type=int, default=200)
    parser.add_argument("--method", default="entropy")
    options = parser.parse_args()
    subject = temporary_subject(options)
    inputs, _ = subject.images("test", options.test_images)
    histograms = subject.histograms()
    kind = NetworkKind(options.model, subject.prepared.num_classes, subject.shape)
    folded = network_from_weights(subject.files["weights"], kind).folded
    found = {}
    for dialect in ("cpu", "tensorrt"):
        amax = subject.amax(histograms, dialect, options.method)
        graph = subject.graph(amax, dialect, f"parity_{dialect}")
        model = fake_quant_from_folded(
            folded.module, subject.prepared.plan, dialect=dialect, activation_amax=amax,
            weight_amax=weight_amax(folded.module, subject.prepared.plan),
        )  # fmt: skip
        with torch.inference_mode(), exportable_fake_quant():
            torch_logits = np.concatenate(
                [model(torch.from_numpy(part)).numpy() for part in np.array_split(inputs, 16)]
            )
        others = {"pytorch, images one at a time": one_at_a_time(model, inputs)}
        for name in ("onnxruntime", "openvino"):
            engine = open_engine(name, threads=0)
            built = engine.build(graph, precision="int8", batch_size=8, float_remainder="fp32")
            runner = engine.load(built.blob, precision="int8", batch_size=8, float_remainder="fp32")
            others[name] = np.concatenate([runner(inputs[start : start + 8]) for start in range(0, len(inputs), 8)])
        for name, logits in others.items():
            cosine = cosine_per_image(torch_logits, logits)
            agreement = 100 * float(np.mean(torch_logits.argmax(1) == logits.argmax(1)))
            found[f"{dialect} {name}"] = {
                "images": len(inputs),
                "cosine_min": float(cosine.min()),
                "cosine_mean": float(cosine.mean()),
                "share_of_images_with_cosine_at_least_0.999": float(np.mean(cosine >= 0.999)),
                "top1_agreement_percent": agreement,
                "sqnr_db": sqnr_db(torch_logits, logits),
                "largest_difference_over_largest_logit": float(
                    np.abs(torch_logits - logits).max() / np.abs(torch_logits).max()
                ),
            }
            print(f"{dialect:9} {name:12} cosine min {cosine.min():.6f} mean {cosine.mean():.6f}, {agreement:.1f} %")
    write_result(options, "parity", found)


def one_at_a_time(model: torch.nn.Module, inputs: np.ndarray) -> np.ndarray:
    """Returns the logits of the same model on single images with oneDNN off: only the order of float sums differs."""
    with torch.inference_mode(), exportable_fake_quant(), torch.backends.mkldnn.flags(enabled=False):
        return np.concatenate([model(torch.from_numpy(image[None])).numpy() for image in inputs])


if __name__ == "__main__":
    main()
