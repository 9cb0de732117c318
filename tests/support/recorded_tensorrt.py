"""TensorRT's Python module of three generations, as far as the adapter may use it.

Each object offers the names that the release's own bindings have and raises AttributeError for any other, read or
written. What it does behind them is what the release does as far as that can be had without a GPU: it refuses what the
release refuses, and an engine is run by ONNX Runtime on the memory whose addresses it is given.
"""

import ctypes
import enum
import json
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto

GENERATIONS = ("8.6.0", "10.16.1.11", "11.4.0.106")

# Names in all three generations, by object.
EVERYWHERE = {
    "Builder": "create_network create_builder_config create_optimization_profile build_serialized_network",
    "IBuilderConfig": (
        "set_flag clear_flag set_memory_pool_limit profiling_verbosity builder_optimization_level "
        "avg_timing_iterations create_timing_cache set_timing_cache get_timing_cache set_tactic_sources "
        "max_aux_streams hardware_compatibility_level add_optimization_profile"
    ),
    "INetworkDefinition": "num_inputs num_outputs get_input get_output num_layers get_layer",
    "ITensor": "name shape dtype",
    "IOptimizationProfile": "set_shape get_shape",
    "OnnxParser": "parse parse_from_file num_errors get_error",
    "Runtime": "deserialize_cuda_engine",
    "ICudaEngine": (
        "num_io_tensors get_tensor_name get_tensor_mode get_tensor_shape get_tensor_dtype get_tensor_profile_shape "
        "create_execution_context create_engine_inspector"
    ),
    "IExecutionContext": (
        "set_input_shape set_tensor_address execute_async_v3 set_optimization_profile_async profiler "
        "enqueue_emits_profile report_to_profiler get_tensor_shape"
    ),
    "EngineInspector": "get_engine_information execution_context",
    "ITimingCache": "serialize combine",
}
# Names that only some generations have.
ONLY = {
    8: {
        "Builder": "platform_has_fast_int8 platform_has_fast_fp16 platform_has_tf32 build_engine",
        "IBuilderConfig": "int8_calibrator max_workspace_size algorithm_selector set_calibration_profile",
        "OnnxParser": "supports_model parse_with_weight_descriptors",
        "ITensor": "set_dynamic_range",
        "ICudaEngine": "device_memory_size get_binding_shape",
        "IExecutionContext": "execute_async_v2",
    },
    10: {
        "Builder": "platform_has_fast_int8 platform_has_fast_fp16 platform_has_tf32",
        "IBuilderConfig": "int8_calibrator algorithm_selector set_calibration_profile",
        "OnnxParser": "supports_model parse_with_weight_descriptors supports_model_v2",
        "ITensor": "set_dynamic_range",
        "ICudaEngine": "device_memory_size device_memory_size_v2",
    },
    11: {"OnnxParser": "supports_model_v2", "ICudaEngine": "device_memory_size_v2"},
}
PREFER = ("PREFER_AOT_PYTHON_PLUGINS", "PREFER_JIT_PYTHON_PLUGINS")
NETWORK_FLAGS = {
    8: ("EXPLICIT_BATCH", "EXPLICIT_PRECISION"),
    10: ("EXPLICIT_BATCH", "STRONGLY_TYPED", *PREFER),
    11: ("STRONGLY_TYPED", *PREFER),
}
BUILDER_FLAGS = {
    8: ("FP16", "INT8", "FP8", "TF32", "OBEY_PRECISION_CONSTRAINTS", "REFIT", "DISABLE_TIMING_CACHE"),
    10: ("FP16", "BF16", "INT8", "FP8", "INT4", "FP4", "TF32", "STRIP_PLAN", "WEIGHTLESS", "EDITABLE_TIMING_CACHE"),
    11: ("TF32", "STRIP_PLAN", "REFIT_IDENTICAL", "REFIT_INDIVIDUAL", "EDITABLE_TIMING_CACHE"),
}
TACTIC_SOURCES = {
    8: ("CUBLAS", "CUBLAS_LT", "CUDNN", "EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"),
    10: ("CUBLAS", "CUBLAS_LT", "CUDNN", "EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"),
    11: ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"),
}


def numbered(name, members):
    return enum.IntEnum(name, {member: index for index, member in enumerate(members)})


class Recorded:
    """An object that has the public names recorded for its release and no others."""

    def __init__(self, kind, release, **values):
        names = EVERYWHERE[kind].split() + ONLY[release.major].get(kind, "").split()
        object.__setattr__(self, "_kind", kind)
        object.__setattr__(self, "_names", frozenset(names))
        object.__setattr__(self, "_values", dict(values))
        object.__setattr__(self, "_release", release)

    def __getattr__(self, name):
        values = object.__getattribute__(self, "_values")
        if name in object.__getattribute__(self, "_names") and name in values:
            return values[name]
        release = object.__getattribute__(self, "_release")
        raise AttributeError(f"{self._kind} of TensorRT {release.version} has no {name}")

    def __setattr__(self, name, value):
        if name not in self._names:
            raise AttributeError(f"{self._kind} of TensorRT {self._release.version} has no {name}")
        self._values[name] = value


class Release:
    """One generation. What the adapter did with it can be read: `parsed`, `network_flags`, `set_flags`, `profile`."""

    def __init__(self, version):
        self.version, self.major = version, int(version.split(".")[0])
        self.parsed = b""
        self.network_flags = self.set_flags = self.cleared_flags = frozenset()
        self.profile = None
        self.fails_to_build = False

    def module(self):
        """Returns what `import tensorrt` gives."""
        major = self.major
        types = ("FLOAT", "HALF", "INT8", "INT32") + (("BF16",) if major >= 10 else ())
        self.flag_kinds = numbered("BuilderFlag", BUILDER_FLAGS[major])
        self.network_kinds = numbered("NetworkDefinitionCreationFlag", NETWORK_FLAGS[major])
        self.data_types = numbered("DataType", types)
        self.modes = numbered("TensorIOMode", ("NONE", "INPUT", "OUTPUT"))
        severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3, VERBOSE=4)
        return SimpleNamespace(
            __version__=self.version,
            ILogger=type("ILogger", (), {"Severity": severity}),
            NetworkDefinitionCreationFlag=self.network_kinds,
            BuilderFlag=self.flag_kinds,
            TacticSource=numbered("TacticSource", TACTIC_SOURCES[major]),
            ProfilingVerbosity=numbered("ProfilingVerbosity", ("LAYER_NAMES_ONLY", "NONE", "DETAILED")),
            LayerInformationFormat=numbered("LayerInformationFormat", ("ONELINE", "JSON")),
            TensorIOMode=self.modes,
            DataType=self.data_types,
            Builder=self.builder,
            OnnxParser=self.parser,
            Runtime=lambda log: Recorded("Runtime", self, deserialize_cuda_engine=lambda blob: self.engine(blob, log)),
        )

    def builder(self, log):
        def create_network(flags=0):
            self.network_flags = frozenset(kind.name for kind in self.network_kinds if flags & (1 << kind))
            return Recorded("INetworkDefinition", self, num_layers=0, get_layer=lambda index: None)

        def profile():
            shapes = {}

            def set_shape(name, least, best, most):
                shapes[name] = (tuple(least), tuple(best), tuple(most))

            return Recorded("IOptimizationProfile", self, set_shape=set_shape, get_shape=shapes.get)

        return Recorded(
            "Builder", self, create_network=create_network, create_builder_config=self.config,
            create_optimization_profile=profile,
            build_serialized_network=lambda network, config: self.build(network, config, log),
        )  # fmt: skip

    def config(self):
        set_flags, cleared = set(), set()
        cache = {"held": b""}

        def create(content):
            return Recorded("ITimingCache", self, serialize=lambda: bytes(content))

        def hold(given, ignore_mismatch):
            content = given.serialize()
            if content and not content.startswith(self.version.encode()) and not ignore_mismatch:
                return False
            cache["held"] = content
            return True

        def add(profile):
            self.profile = profile
            return 0

        self._flags, self._cleared, self._cache = set_flags, cleared, cache
        return Recorded(
            "IBuilderConfig", self, set_flag=set_flags.add, clear_flag=cleared.add, builder_optimization_level=3,
            create_timing_cache=create, set_timing_cache=hold, get_timing_cache=lambda: create(cache["held"]),
            add_optimization_profile=add, profiling_verbosity=None,
        )  # fmt: skip

    def parser(self, network, log):
        errors = []

        def parse(content):
            self.parsed = bytes(content)
            try:
                model = onnx.load_model_from_string(self.parsed)
            except Exception as error:
                errors.append(str(error))
                return False
            if self.major == 8 and "EXPLICIT_BATCH" not in self.network_flags:
                errors.append("this version of the parser only supports networks with an explicit batch")
            if self.major == 8 and model.opset_import[0].version > 17:
                errors.append(f"opset {model.opset_import[0].version} is not supported")
            if errors:
                return False
            network._values.update(
                num_inputs=len(model.graph.input), num_outputs=len(model.graph.output),
                get_input=lambda index: self.tensor(model.graph.input[index]),
                get_output=lambda index: self.tensor(model.graph.output[index]),
            )  # fmt: skip
            return True

        found = Recorded("OnnxParser", self, parse=parse, get_error=lambda index: errors[index])
        found._values["num_errors"] = 0
        object.__setattr__(found, "_values", ErrorCount(found._values, errors))
        return found

    def tensor(self, entry):
        shape = tuple(item.dim_value if item.HasField("dim_value") else -1 for item in entry.type.tensor_type.shape.dim)
        return Recorded("ITensor", self, name=entry.name, shape=shape, dtype=self.data_types.FLOAT)

    def build(self, network, config, log):
        self.set_flags = frozenset(flag.name for flag in self._flags)
        self.cleared_flags = frozenset(flag.name for flag in self._cleared)
        model = onnx.load_model_from_string(self.parsed)
        strong = self.major >= 11 or "STRONGLY_TYPED" in self.network_flags
        quantized = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
        problem = "out of memory" if self.fails_to_build else ""
        if strong and self.set_flags & {"FP16", "INT8", "BF16"}:
            problem = "precision flags cannot be set for a strongly typed network"
        if not strong and quantized and "INT8" not in self.set_flags:
            problem = "the network has Q/DQ layers, and INT8 is not enabled"
        if problem:
            log.log(1, problem)
            return None
        (entry,) = model.graph.input
        shape = self.tensor(entry).shape
        if -1 in shape:
            if self.profile is None:
                log.log(1, "network has dynamic inputs, but no optimization profile has been defined")
                return None
            shape = self.profile.get_shape(entry.name)[1]
        self._cache["held"] = f"{self.version} {entry.name} {quantized}".encode()
        return json.dumps({"release": self.version, "shape": shape}).encode() + b"\n" + self.parsed

    def engine(self, blob, log):
        header, _, content = bytes(blob).partition(b"\n")
        if json.loads(header)["release"] != self.version:
            log.log(1, "the engine was built by another version")
            return None
        model, shape = onnx.load_model_from_string(content), tuple(json.loads(header)["shape"])
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        (source,), (target,) = model.graph.input, model.graph.output
        shapes = {source.name: shape, target.name: (shape[0], *self.tensor(target).shape[1:])}
        modes = {source.name: self.modes.INPUT, target.name: self.modes.OUTPUT}
        addresses = {}

        def execute(stream):
            read = (ctypes.c_float * int(np.prod(shape))).from_address(addresses[source.name])
            found = session.run(None, {source.name: np.array(read, np.float32).reshape(shape)})[0]
            ctypes.memmove(addresses[target.name], found.ctypes.data, found.nbytes)
            return True

        def context():
            return Recorded(
                "IExecutionContext", self, set_input_shape=lambda name, given: tuple(given) == shape,
                get_tensor_shape=shapes.get, set_tensor_address=addresses.__setitem__, execute_async_v3=execute,
            )  # fmt: skip

        memory = {"device_memory_size": 4096, "device_memory_size_v2": 4096}
        return Recorded(
            "ICudaEngine", self, num_io_tensors=2, get_tensor_name=lambda index: list(modes)[index],
            get_tensor_mode=modes.get, get_tensor_shape=shapes.get,
            get_tensor_dtype=lambda name: self.data_types.FLOAT,
            get_tensor_profile_shape=lambda name, index: (shape, shape, shape), create_execution_context=context,
            create_engine_inspector=lambda: Recorded(
                "EngineInspector", self, get_engine_information=lambda form: self.information(model)
            ),
            **memory,
        )  # fmt: skip

    def information(self, model):
        """The inspector's JSON, with the types that a graph of this precision gets."""
        half = any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer)
        quantized = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
        kind = "Int8" if quantized else "Half" if half or "FP16" in self.set_flags else "Float"
        if self.major >= 11:
            described = {"Name": "t", "Format": "Row major linear", "DataType": kind}
            ends = {"I/O Tensors": []}
        else:
            words = {"Int8": "Row major Int8 format", "Half": "Row major linear FP16 format"}
            described = {"Name": "t", "Format/Datatype": words.get(kind, "Row major linear FP32")}
            ends = {"Bindings": []}
        layers = [
            {"Name": node.name, "LayerType": "conv", "ParameterType": "Convolution", "Inputs": [described],
             "Outputs": [described]}
            for node in model.graph.node if node.op_type == "Conv"
        ]  # fmt: skip
        return json.dumps({"Layers": layers, **ends})


class ErrorCount(dict):
    """A parser's values, whose number of errors is counted when it is read."""

    def __init__(self, values, errors):
        super().__init__(values)
        self.errors = errors

    def __getitem__(self, name):
        return len(self.errors) if name == "num_errors" else super().__getitem__(name)


class CpuTorch:
    """The part of torch that the runner uses, with the CPU in place of the device. A captured graph calls again."""

    def __init__(self, torch):
        self._torch = torch
        self.float32, self.float16 = torch.float32, torch.float16
        self.from_numpy = torch.from_numpy
        self.cuda = SimpleNamespace(
            Stream=lambda: SimpleNamespace(synchronize=lambda: None, cuda_stream=0),
            stream=self._nothing, synchronize=lambda: None, graph=self._capture, CUDAGraph=self._graph,
            current_stream=lambda: SimpleNamespace(cuda_stream=0), Event=self._event,
            get_device_name=lambda index: "a GPU",
        )  # fmt: skip

    def zeros(self, *shape, dtype, device="cpu"):
        tensor = self._torch.zeros(*shape, dtype=dtype)
        return Pinned(tensor) if device == "cpu" else tensor

    @contextmanager
    def _nothing(self, stream):
        yield

    @contextmanager
    def _capture(self, graph, stream, capture_error_mode):
        yield

    def _graph(self):
        return SimpleNamespace(replay=lambda: None)

    def _event(self, enable_timing):
        import time

        event = SimpleNamespace(at=0.0, synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", time.perf_counter())
        event.elapsed_time = lambda other: 1000 * (other.at - event.at)
        return event


def Pinned(tensor):
    """A host tensor whose `pin_memory` needs no driver."""
    tensor.pin_memory = lambda: tensor
    return tensor
