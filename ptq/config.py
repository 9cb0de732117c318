"""What may a person set?

Every option of the pipeline, one frozen pydantic class per stage, composed in `PtqConfig`. The one-sentence
descriptions are the form that the Prefect UI shows. Nothing is computed here.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Method = Literal["max", "percentile", "mse", "entropy"]
Dialect = Literal["cpu", "onnxruntime", "tensorrt"]
EngineName = Literal["auto", "openvino", "tensorrt", "onnxruntime"]
WeightMethod = Literal["max", "mse"]
Precision = Literal["fp32", "fp16", "bf16", "int8"]
# Instruction sets that kernels can be limited to, as oneDNN names them, from the oldest to the newest.
Isa = Literal[
    "sse41", "avx2", "avx2_vnni", "avx512_core", "avx512_core_vnni", "avx512_core_bf16", "avx512_core_fp16",
    "avx512_core_amx",
]  # fmt: skip

METHODS: tuple[Method, ...] = get_args(Method)
Percentile = Annotated[float, Field(gt=0, le=100)]
# The first look at a draw of adaptive length is after so many images.
LEAST_ADAPTIVE_IMAGES = 32
DEFAULT_STORE = "file://.ptq/store"
DIALECTS: tuple[Dialect, ...] = get_args(Dialect)
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
ISAS: tuple[Isa, ...] = get_args(Isa)
# In which `ptq export` writes a graph.
EXPORT_PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")
_SCHEDULER = re.compile(r"(tcp|tls)://[^/:@\s]+:[0-9]{1,5}")


class _Section(BaseModel):
    """Settings shared by all sections: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Decoding(_Section):
    """The part of the preprocessing that makes pixels of a file. See `PreprocessingConfig`."""

    channels: Literal[1, 3]
    resize: int
    crop: int
    interpolation: Literal["nearest", "bilinear", "bicubic"]


class Normalization(_Section):
    """The part of the preprocessing that makes the network's input of pixels. See `PreprocessingConfig`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class PreprocessingConfig(_Section):
    """How a file becomes the network's input; what is not set is the network's own, where its source states it."""

    channels: Literal[1, 3] = Field(3, description="Channels of the network's input: 3 for RGB, 1 for grey.")
    resize: int = Field(256, ge=4, le=4096, description="Length of the shorter side after resizing, in pixels.")
    crop: int = Field(224, ge=4, le=4096, description="Side of the centred square that is kept, at most resize.")
    interpolation: Literal["nearest", "bilinear", "bicubic"] = Field(
        "bilinear", description="Filter used when an image is resized."
    )
    mean: tuple[float, ...] = Field(
        (0.485, 0.456, 0.406), description="Mean per channel, or one for all, subtracted from pixels in [0, 1]."
    )
    std: tuple[float, ...] = Field(
        (0.229, 0.224, 0.225), description="Standard deviation per channel, or one for all, in units of [0, 1]."
    )

    @model_validator(mode="before")
    @classmethod
    def _one_for_every_channel(cls, content: Any) -> Any:
        if not isinstance(content, Mapping) or content.get("channels", 3) != 3:
            return content
        given = {name: content.get(name) for name in ("mean", "std")}
        single = {name: [*of] * 3 for name, of in given.items() if isinstance(of, list | tuple) and len(of) == 1}
        return {**content, **single}

    @model_validator(mode="after")
    def _fits(self) -> "PreprocessingConfig":
        if self.crop > self.resize:
            raise ValueError(f"crop is {self.crop} and resize {self.resize}: crop must be at most resize")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise ValueError(
                    f"{name} has {len(values)} values and channels is {self.channels}: give one value per channel, "
                    f"for grey images for example mean [0.5] and std [0.5]"
                )
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {list(self.std)}")
        return self

    @property
    def decoding(self) -> Decoding:
        """What prepared images depend on."""
        return Decoding(channels=self.channels, resize=self.resize, crop=self.crop, interpolation=self.interpolation)

    @property
    def normalization(self) -> Normalization:
        """What is done to prepared images whenever they are used."""
        return Normalization(mean=self.mean, std=self.std)


class SplitNames(_Section):
    """The part of the data's settings that says what each split is for. See `DataConfig`."""

    calibration_split: str
    selection_split: str
    test_split: str


class DataConfig(_Section):
    """Which images are used, and for what."""

    path: str = Field(
        description=(
            "An image folder with one folder per split and in it one per class, or a manifest (.csv, .parquet); local, "
            "or in S3 as s3://bucket/prefix or s3://bucket/manifest.csv."
        )
    )
    calibration_split: str = Field("train", description="Split from which calibration images are drawn.")
    selection_split: str = Field("val", description="Split on which the best candidate is chosen.")
    test_split: str = Field("test", description="Split on which the verdict is reported.")
    preprocessing: PreprocessingConfig = Field(
        default_factory=PreprocessingConfig, description="How a file becomes the network's input."
    )

    @property
    def splits(self) -> SplitNames:
        """What an index of the images depends on, beside where they lie."""
        return SplitNames(
            calibration_split=self.calibration_split, selection_split=self.selection_split, test_split=self.test_split
        )


def is_onnx_file(path: object) -> bool:
    """Whether a path is that of an ONNX file, by its ending."""
    return isinstance(path, str) and path.lower().endswith(".onnx")


class ModelConfig(_Section):
    """Which network is quantized."""

    name: str = Field(
        "",
        description=(
            "A torchvision classifier such as resnet50, timm/NAME, hf/FOLDER or package.module:factory; left empty for "
            "an ONNX file, which is called by its stem."
        ),
    )
    checkpoint: str = Field(
        description=(
            "File with the FP32 weights: what torch.save wrote, or .safetensors; or an FP32 classifier as .onnx; "
            "local, or in S3 as s3://bucket/key. Left out for hf/FOLDER, which has them."
        )
    )
    publish_as: str = Field(
        "",
        pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$",
        description="Name under which the model is published; empty: the model's name.",
    )

    @model_validator(mode="before")
    @classmethod
    def _name_of_file(cls, content: Any) -> Any:
        if isinstance(content, Mapping) and is_onnx_file(content.get("checkpoint")) and not content.get("name"):
            return {**content, "name": Path(content["checkpoint"]).stem}
        if isinstance(content, Mapping) and str(content.get("name", "")).startswith("hf/"):
            return {"checkpoint": content["name"].removeprefix("hf/"), **content}
        return content

    @model_validator(mode="after")
    def _one_network(self) -> "ModelConfig":
        if not self.name:
            raise ValueError("name is missing: give a torchvision classifier or package.module:factory")
        if self.is_onnx and self.name != Path(self.checkpoint).stem:
            raise ValueError(
                f"name is {self.name!r} and checkpoint {self.checkpoint!r}: an ONNX file holds its own network; leave "
                "name out, publish_as names what is published"
            )
        return self

    @property
    def is_onnx(self) -> bool:
        """Whether the model comes as an ONNX file, without its PyTorch network."""
        return is_onnx_file(self.checkpoint)

    @property
    def published_name(self) -> str:
        """The name under `models/` in the store."""
        return self.publish_as or re.sub(r"[^A-Za-z0-9._-]+", "-", self.name.replace(":", ".")).lstrip("._-")


class QuantizationConfig(_Section):
    """Where quantizers are placed and how weights are scaled."""

    residuals: bool = Field(True, description="Quantize the identity branch of every residual add.")
    pools: bool = Field(True, description="Quantize the inputs of average pools.")
    commuting_pools: bool = Field(
        True, description="Place quantizers before max pools and permutations, so that these run in INT8."
    )
    first_layer: bool = Field(True, description="Quantize the first convolution.")
    last_layer: bool = Field(True, description="Quantize the last linear layer.")
    skip_layers: tuple[str, ...] = Field((), description="Layers, or modules with layers in them, left in float.")
    weight_method: WeightMethod = Field(
        "max",
        description="How the amax of each output channel's weights is chosen: largest |w|, or least squared error.",
    )
    equalization: bool = Field(
        True, description="Scale channels against the layers around them, so that their ranges come closer."
    )
    bias_correction: bool = Field(True, description="Take the mean error of rounded weights back in the biases.")
    dialects: tuple[Dialect, ...] = Field(
        (), description="Dialects of the Q/DQ graph to write; empty: the one of the engine."
    )

    @property
    def placement(self) -> "QuantizationConfig":
        """The same quantizers, with every field at its default that has no say in where they go."""
        elsewhere = {"weight_method", "equalization", "bias_correction", "dialects"}
        return QuantizationConfig(**self.model_dump(exclude=elsewhere))

    def dialects_for(self, engine: str) -> tuple[Dialect, ...]:
        """Returns the dialects to write, the evaluated one first: the engine's own where it is asked for."""
        own: Dialect = "onnxruntime" if engine == "onnxruntime" else "tensorrt" if engine == "tensorrt" else "cpu"
        asked = tuple(dict.fromkeys(self.dialects)) or (own,)
        return tuple(sorted(asked, key=lambda dialect: dialect != own))


class LabelledMethod(_Section):
    """A method as candidates and tables name it: `percentile-99.9` where there are several percentiles.

    `percentile` is set for the method of that name and None for the others.
    """

    label: str
    method: Method
    percentile: Percentile | None = None


class StoppingRule(_Section):
    """When a draw has enough images: every method's amax, for this dialect's integers, is within the tolerance."""

    methods: tuple[LabelledMethod, ...]
    dialect: Dialect
    tolerance_percent: float


class CalibrationConfig(_Section):
    """How activation ranges are chosen."""

    methods: tuple[Method, ...] = Field(METHODS, min_length=1, description="Methods that choose amax, all compared.")
    trials: int = Field(5, ge=1, le=100, description="Number of seeded draws of calibration images.")
    images: int = Field(
        512, ge=1, le=1_000_000, description="Calibration images in each draw; the most, where there is a tolerance."
    )
    tolerance_percent: float = Field(
        0.0,
        ge=0,
        le=100,
        description=(
            "Stop a draw early, once the 95 % interval of every layer's amax reaches at most this far to either side, "
            "in percent of amax; 0: use all images."
        ),
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Seed of the first draw; draw i uses seed + i.")
    percentiles: tuple[Percentile, ...] = Field(
        (99.99, 99.95),
        min_length=1,
        description="Share of values the percentile method keeps, in percent; each of several is a method of its own.",
    )
    bins: Literal[1024, 2048, 4096, 8192] = Field(4096, description="Bins of each activation histogram.")

    @model_validator(mode="after")
    def _unique(self) -> "CalibrationConfig":
        if len(set(self.methods)) != len(self.methods):
            raise ValueError(f"methods names one method twice: {list(self.methods)}")
        if len(set(self.percentiles)) != len(self.percentiles):
            raise ValueError(f"percentiles names one percentile twice: {list(self.percentiles)}")
        if self.tolerance_percent and self.images < LEAST_ADAPTIVE_IMAGES:
            raise ValueError(
                f"tolerance_percent is {self.tolerance_percent:g} and images {self.images}: an interval needs at least "
                f"{LEAST_ADAPTIVE_IMAGES} images; raise images, or set tolerance_percent to 0"
            )
        if self.tolerance_percent and self.methods == ("max",):
            raise ValueError(
                f"tolerance_percent is {self.tolerance_percent:g} and methods is ['max']: the maximum of a sample has "
                "no interval; add a method, or set tolerance_percent to 0"
            )
        return self

    @property
    def is_adaptive(self) -> bool:
        """Whether a draw may end before its last image."""
        return self.tolerance_percent > 0

    def stopping_rule(self, dialect: Dialect) -> StoppingRule | None:
        """Returns when a draw has enough images, None where it is to use all of them."""
        if not self.is_adaptive:
            return None
        return StoppingRule(methods=self.labelled_methods, dialect=dialect, tolerance_percent=self.tolerance_percent)

    @property
    def labelled_methods(self) -> tuple[LabelledMethod, ...]:
        """The methods in the order given, with one entry for every percentile."""
        found = []
        for method in self.methods:
            if method != "percentile":
                found.append(LabelledMethod(label=method, method=method))
                continue
            for percentile in self.percentiles:
                label = method if len(self.percentiles) == 1 else f"{method}-{repr(percentile).removesuffix('.0')}"
                found.append(LabelledMethod(label=label, method=method, percentile=percentile))
        return tuple(found)

    def labelled(self, label: str) -> LabelledMethod:
        """Returns the method of that label.

        Raises:
            ValueError: calibration was not asked for it.
        """
        for found in self.labelled_methods:
            if found.label == label:
                return found
        known = ", ".join(found.label for found in self.labelled_methods)
        raise ValueError(f"{label!r} is not a method of this calibration; expected one of {known}.")


class EngineConfig(_Section):
    """What runs the model."""

    name: EngineName = Field(
        "auto", description="Inference engine; auto takes TensorRT where it is usable, else OpenVINO."
    )
    threads: int = Field(0, ge=0, le=1024, description="CPU threads of the engine; 0: all cores.")
    float_remainder: Literal["fp32", "bf16"] = Field(
        "fp32", description="Precision of what stays in float in an INT8 graph on a CPU."
    )
    isa: Literal["portable", "native", Isa] = Field(
        "portable",
        description="CPUs the INT8 model is right on: portable, every x86 CPU with AVX2 or newer; native, those like "
        "this one; or the instruction set, such as avx2, that this run is limited to.",
    )
    evaluation_batch_size: int = Field(32, ge=1, le=1024, description="Images per inference during evaluation.")


class BenchmarkConfig(_Section):
    """How latency and throughput are measured."""

    batch_sizes: tuple[Annotated[int, Field(ge=1, le=65536)], ...] = Field(
        (1, 32), min_length=1, description="Batch sizes measured, in images."
    )
    warmup_ms: float = Field(200.0, ge=0, le=60_000, description="Time run before measuring, in milliseconds.")
    duration_s: float = Field(3.0, gt=0, le=600, description="Time measured per precision and batch size, in seconds.")
    min_iterations: int = Field(10, ge=1, le=100_000, description="Least number of measured inferences.")
    rounds: int = Field(3, ge=1, le=100, description="Rounds over which the precisions are interleaved.")


class GateConfig(_Section):
    """When a model is accepted."""

    max_drop_pp: float = Field(1.0, ge=-100, le=100, description="Largest accuracy drop, in percentage points.")
    min_speedup_fp32: float = Field(
        1.0, ge=0, le=1000, description="Least ratio of FP32's median latency to INT8's, at every batch size."
    )
    min_speedup_fp16: float = Field(
        0.0, ge=0, le=1000, description="The same ratio for the faster of FP16 and BF16; 0: not asked."
    )
    min_int8_macs_percent: float = Field(
        95.0, ge=0, le=100, description="Least share of multiply-accumulates in INT8, layers left out by choice apart."
    )
    max_regression_pp: float = Field(
        1.0, ge=0, le=100, description="Largest loss of top-1 against the version in service, in pp; 100: any."
    )
    max_slowdown: float = Field(
        1.1, ge=0.1, le=1000, description="Largest ratio of the median latency to that of the version in service."
    )
    isas: tuple[Literal["native"] | Isa, ...] = Field(
        (), description="Instruction sets under which the drop must hold too, such as avx2; OpenVINO only."
    )
    publish_inconclusive: bool = Field(
        False,
        description="Publish a model that measured worse than the version in service, where chance can explain it.",
    )


class FallbackConfig(_Section):
    """What is tried, in this order, where a model is rejected for its accuracy alone."""

    per_layer_method: bool = Field(
        False, description="Try, for each quantizer, the method whose amax keeps the logits closest to FP32's."
    )
    float_layers: int = Field(
        0,
        ge=0,
        le=1000,
        description="Most sensitive layers that may stay in float, tried as 1, 2, 4, ... up to this number; 0: none.",
    )
    qat_epochs: int = Field(
        0, ge=0, le=1000, description="Passes of quantization-aware training over the drawn images; 0: not tried."
    )
    qat_learning_rate: float = Field(
        1e-3, gt=0, le=1, description="Peak learning rate of quantization-aware training, on a one-cycle schedule."
    )
    images: int = Field(
        64, ge=1, le=100_000, description="Calibration images, of the best trial's draw, that measure sensitivity."
    )


class RunnerConfig(_Section):
    """Where stages run of which there are many: parts of the calibration images, amax tables, candidates."""

    name: Literal["threads", "dask"] = Field(
        "threads",
        description="threads: on the machine of the flow; dask: on the workers of a Dask cluster, with the same bits.",
    )
    address: str = Field(
        "", description="Address of the Dask scheduler, such as tcp://10.0.0.5:8786; read where name is dask."
    )
    shards: int = Field(
        8,
        ge=1,
        le=1024,
        description=(
            "Parts into which Dask workers take the drawn images, each with its place in the store; best a multiple of "
            "the workers. One part where calibration.tolerance_percent is set."
        ),
    )

    @model_validator(mode="after")
    def _has_address(self) -> "RunnerConfig":
        if self.name == "dask" and not _SCHEDULER.fullmatch(self.address):
            raise ValueError(
                f"address is {self.address!r} and name 'dask': give the scheduler's address as tcp://host:port; "
                "`make dask` starts a cluster at tcp://127.0.0.1:8786"
            )
        return self


class OutputConfig(_Section):
    """Where results go."""

    store: str = Field(DEFAULT_STORE, description="Store of artifacts: its URI, or the path of a folder.")
    directory: str = Field("ptq-output", description="Folder that receives the report, the graphs and the tables.")


class PtqConfig(_Section):
    """Everything a run of `quantize_model` needs."""

    model: ModelConfig
    data: DataConfig
    quantization: QuantizationConfig = Field(default_factory=QuantizationConfig)
    calibration: CalibrationConfig = Field(default_factory=CalibrationConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    benchmark: BenchmarkConfig = Field(default_factory=BenchmarkConfig)
    gate: GateConfig = Field(default_factory=GateConfig)
    fallback: FallbackConfig = Field(default_factory=FallbackConfig)
    runner: RunnerConfig = Field(default_factory=RunnerConfig)
    output: OutputConfig = Field(default_factory=OutputConfig)

    @model_validator(mode="after")
    def _has_methods_to_choose_from(self) -> "PtqConfig":
        if self.fallback.per_layer_method and len(self.calibration.labelled_methods) < 2:
            raise ValueError(
                f"fallback.per_layer_method is true and calibration.methods is {list(self.calibration.methods)}: "
                "give at least two methods, or two percentiles, to choose from"
            )
        return self

    @model_validator(mode="after")
    def _has_network_to_fall_back_on(self) -> "PtqConfig":
        asked = [name for name in ("per_layer_method", "float_layers", "qat_epochs") if getattr(self.fallback, name)]
        if self.model.is_onnx and asked:
            raise ValueError(
                f"fallback.{asked[0]} works on the PyTorch network and model.checkpoint is {self.model.checkpoint!r}: "
                "leave the section fallback out, or give the network's name and its weights; "
                "quantization.skip_layers leaves layers of an ONNX file in float"
            )
        return self


class TrainingConfig(_Section):
    """How `ptq train` trains an FP32 classifier."""

    model: str = Field("resnet50", description="A torchvision classifier, or package.module:factory.")
    data: DataConfig
    epochs: int = Field(10, ge=1, le=1000, description="Passes over the training images.")
    batch_size: int = Field(64, ge=2, le=4096, description="Images per step.")
    learning_rate: float = Field(0.05, gt=0, le=10, description="Peak learning rate of the one-cycle schedule.")
    weight_decay: float = Field(5e-4, ge=0, le=1, description="Weight decay of SGD.")
    augment: bool = Field(True, description="Shift training images by up to an eighth of their side.")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Seed of weights, order and augmentation.")
    checkpoint: str = Field("", description="Weights to start from; empty: random.")
    output: str = Field("checkpoint.pth", description="File that receives the weights.")
