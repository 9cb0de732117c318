"""Which instruction set do the kernels of this process use?

oneDNN, whose kernels OpenVINO runs on a CPU, takes the newest instructions that the processor has, up to the limit in
the environment variable `ONEDNN_MAX_CPU_ISA`; so a machine can be made to compute as an older one does. The names are
oneDNN's, in lower case. Processors under one name ("AMD EPYC") differ in what they have, and in their results.
"""

import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path

from ptq.config import ISAS
from ptq.errors import EngineBuildError, UsageError

_LIMIT = "ONEDNN_MAX_CPU_ISA"
# What each set needs of the processor, as Linux names it, from the oldest to the newest.
_AVX512 = frozenset({"sse4_1", "avx2", "avx512f", "avx512bw", "avx512vl", "avx512dq"})
_VNNI = _AVX512 | {"avx512_vnni"}
_NEEDS: dict[str, frozenset[str]] = {
    "sse41": frozenset({"sse4_1"}),
    "avx2": frozenset({"sse4_1", "avx2"}),
    "avx2_vnni": frozenset({"sse4_1", "avx2", "avx_vnni"}),
    "avx512_core": _AVX512,
    "avx512_core_vnni": _VNNI,
    "avx512_core_bf16": _VNNI | {"avx512_bf16"},
    "avx512_core_fp16": _VNNI | {"avx512_bf16", "avx512_fp16"},
    "avx512_core_amx": _VNNI | {"avx512_bf16", "avx512_fp16", "amx_int8"},
}
# Other names that oneDNN takes for a limit; what it does not know, it does not heed.
_SYNONYMS = {"avx": "sse41", "avx2_vnni_2": "avx2_vnni", "avx10_1_512": "avx512_core_fp16"}
_SYNONYMS |= dict.fromkeys(("avx10_1_512_amx", "avx10_1_512_amx_fp16", "avx512_core_amx_fp16"), "avx512_core_amx")
# Those that add two products in 16 bits; see `numerics.saturation`.
_WITHOUT_VNNI = ("sse41", "avx2", "avx512_core")


def current_isa() -> str:
    """Returns the instruction set that kernels of this process use: one of `ISAS`, or the name of another architecture.

    A processor that is not x86, or a system that does not tell what it has, is named as Python names it (`arm64`).
    """
    limit = os.environ.get(_LIMIT, os.environ.get("DNNL_MAX_CPU_ISA", "")).lower()
    usable = isas_within(_processor_features(), limit=_SYNONYMS.get(limit, limit))
    return usable[-1] if usable else platform.machine().lower()


def playable_isas() -> tuple[str, ...]:
    """Returns the instruction sets of this processor, oldest first: those that `play_isa` takes."""
    return isas_within(_processor_features())


def isas_within(features: Iterable[str], *, limit: str = "") -> tuple[str, ...]:
    """Returns the instruction sets that a processor with these features can run, oldest first.

    Args:
        features: as Linux names them in `flags`.
        limit: the newest that may be used; no limit where it is none of `ISAS`.

    >>> isas_within(["sse4_1", "avx2", "avx_vnni"], limit="avx2")
    ('sse41', 'avx2')
    """
    has = frozenset(features) & _NEEDS.get(limit, frozenset().union(*_NEEDS.values()))
    return tuple(name for name, needs in _NEEDS.items() if needs <= has)


def adds_in_16_bits(isa: str) -> bool:
    """Whether INT8 kernels of this instruction set add two products in 16 bits, which can saturate.

    >>> adds_in_16_bits("avx2"), adds_in_16_bits("avx512_core_vnni"), adds_in_16_bits("arm64")
    (True, False, False)
    """
    return isa in _WITHOUT_VNNI


def play_isa(name: str, *, engine: str = "openvino") -> None:
    """Limits the kernels of this process to an instruction set. OpenVINO reads the limit once, when it first runs.

    Raises:
        UsageError: there is no instruction set of that name, or the engine knows no limit.
        EngineBuildError: this processor lacks it, or OpenVINO runs in this process already, with another.
    """
    require_isa(name)
    if engine not in ("auto", "openvino"):
        raise UsageError(
            f"engine.isa is {name}, and engine {engine} uses whatever the processor has. Expected portable or native; "
            "take `--engine openvino` to limit the instruction set."
        )
    if name == current_isa():
        return
    if "openvino" in sys.modules:
        raise EngineBuildError(
            f"OpenVINO runs in this process already, with {current_isa()}, and cannot change to {name}. Set the "
            f"environment variable {_LIMIT}={name.upper()} before the program starts."
        )
    os.environ[_LIMIT] = name.upper()


def limited_environment(name: str) -> dict[str, str]:
    """Returns the environment of a process whose kernels are limited to an instruction set, `native` for none.

    >>> limited_environment("avx2")["ONEDNN_MAX_CPU_ISA"], "ONEDNN_MAX_CPU_ISA" in limited_environment("native")
    ('AVX2', False)
    """
    plain = {key: value for key, value in os.environ.items() if key not in (_LIMIT, "DNNL_MAX_CPU_ISA")}
    return plain if name == "native" else {**plain, _LIMIT: name.upper()}


def require_isa(name: str) -> None:
    """Raises the errors of `play_isa` for a name that this processor cannot play.

    Raises:
        UsageError: there is no instruction set of that name.
        EngineBuildError: this processor lacks it.
    """
    if name not in ISAS:
        raise UsageError(
            f"The instruction set is {name!r}. Those that kernels can be limited to are {', '.join(ISAS)}. Give one of "
            "these, or `native` for all that the processor has."
        )
    playable = playable_isas()
    if name not in playable:
        raise EngineBuildError(
            f"This processor has no {name}; it has {', '.join(playable) or platform.machine()}. Take one of these, or "
            "run on a machine that has it."
        )


def processor_name() -> str:
    """Returns the processor's own name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _processor_features() -> frozenset[str]:
    """What the processor has, as Linux tells; empty where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    return frozenset(flags.split())
