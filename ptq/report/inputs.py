"""Which facts of a run does the report tell, in numbers and sentences?"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ptq.evaluation.predictions import ClassMetrics
from ptq.records.benchmark import BenchmarkRecord, Measurement
from ptq.records.calibration import CalibrationDraws
from ptq.records.data import DataRecord
from ptq.records.decision import Attempt, PublishedComparison
from ptq.records.evaluation import EvaluationRecord, Selection, SplitMetrics, in_method_order
from ptq.records.graph import EngineRecord, GraphChecks
from ptq.records.parity import ParityRecord
from ptq.records.plan import ModelRecord, PlacementPlan
from ptq.records.verdict import Verdict
from ptq.report.cells import drop_phrase, fixed, interval_text, probability, ratio_text
from ptq.wording import first_names

# The page lists all of them elsewhere.
LAYERS_IN_A_SENTENCE = 8


@dataclass(frozen=True, slots=True)
class ReportInputs:
    """Everything a report tells. `candidates` holds one evaluation per amax table, `verdict.candidates` every name.

    `fp32_by_class` and `int8_by_class`, of the chosen candidate, are of the test split.
    """

    verdict: Verdict
    baseline: EvaluationRecord
    fp32_by_class: ClassMetrics
    candidates: tuple[EvaluationRecord, ...]
    int8_by_class: ClassMetrics
    selection: Selection
    benchmark: BenchmarkRecord
    checks: tuple[GraphChecks, ...]
    parity: ParityRecord
    engines: tuple[EngineRecord, ...]
    plan: PlacementPlan
    model: ModelRecord
    data: DataRecord
    draws: CalibrationDraws
    config_yaml: str
    machine: Mapping[str, str]
    warnings: tuple[str, ...]
    attempts: tuple[Attempt, ...] = ()
    versus_published: PublishedComparison | None = None


def verdict_sentence(inputs: ReportInputs) -> str:
    """Returns the decision, the accuracy with its uncertainty and the speed, as text of one or two sentences."""
    best, gate, images = inputs.verdict.best, inputs.verdict.gate, inputs.selection.comparison.images
    is_tuned = any(attempt.kind == "qat" and attempt.decision.accepted for attempt in inputs.attempts)
    tuned = ", weights changed by QAT" if is_tuned else ""
    fact = (
        f"INT8 ({best.method}, trial {best.trial}{tuned}) reaches {fixed(best.top1_percent, 1)} % top-1 on {images:,} "
        f"{inputs.selection.test_split} images, {drop_phrase(best.drop_pp)} "
        f"(95 % interval {interval_text(best.drop_interval_pp)} pp, McNemar {probability(best.mcnemar_p)})"
        f"{_speed_phrase(inputs.benchmark)}."
    )
    if gate.accepted:
        return f"Accepted: {fact}"
    reason = gate.reasons[0].rstrip(".") if gate.reasons else "the gate gave no reason"
    return f"Rejected: {reason}. {fact}"


def evaluation_of(inputs: ReportInputs, candidate_id: str) -> EvaluationRecord:
    """The evaluation of a candidate, or of the one whose amax table it has."""
    same_as = {item.id: item.same_as for item in inputs.verdict.candidates}
    wanted = same_as.get(candidate_id) or candidate_id
    for evaluation in inputs.candidates:
        if evaluation.candidate == wanted:
            return evaluation
    raise ValueError(
        f"Candidate {wanted!r} of the verdict has no evaluation. "
        f"Expected one of {[item.candidate for item in inputs.candidates]}."
    )


def test_metrics(inputs: ReportInputs) -> tuple[SplitMetrics, SplitMetrics]:
    """FP32 and the chosen INT8 candidate on the test split."""
    split = inputs.selection.test_split
    return inputs.baseline.on(split), evaluation_of(inputs, inputs.selection.candidate).on(split)


def methods_of(inputs: ReportInputs) -> tuple[str, ...]:
    """Returns the methods of the candidates, in the order in which tables show them."""
    return in_method_order(item.method for item in inputs.verdict.candidates)


def class_name(inputs: ReportInputs, index: int) -> str:
    """Returns the name of a class, its index where it has none."""
    names = inputs.model.class_names or inputs.data.class_names
    return names[index] if index < len(names) else str(index)


def int8_engines(inputs: ReportInputs) -> list[EngineRecord]:
    """Returns the INT8 engines, by batch size."""
    found = (engine for engine in inputs.engines if engine.precision == "int8")
    return sorted(found, key=lambda engine: engine.batch_size)


def float_layers_in_engine(inputs: ReportInputs) -> tuple[str, ...]:
    """Returns the layers that an INT8 engine runs in float, each once."""
    return _unique(name for engine in int8_engines(inputs) for name in engine.int8.float_layers)


def slower_than_float(record: BenchmarkRecord) -> list[tuple[Measurement, Measurement]]:
    """INT8 and the fastest float precision, at each batch size where INT8 is the slower."""
    found = []
    for int8 in (item for item in record.measurements if item.precision == "int8"):
        floats = [m for m in record.measurements if m.batch_size == int8.batch_size and m.precision != "int8"]
        fastest = min(floats, key=lambda item: item.median_ms, default=int8)
        if fastest.median_ms < int8.median_ms:
            found.append((int8, fastest))
    return found


def slow_sentences(inputs: ReportInputs) -> list[str]:
    """For each batch size at which INT8 does not pay: by how much, and which layers are at fault."""
    sentences = []
    for int8, fastest in slower_than_float(inputs.benchmark):
        percent = 100 * (int8.median_ms / fastest.median_ms - 1)
        sentence = (
            f"INT8 is slower than {fastest.precision.upper()} at batch {int8.batch_size}: {int8.median_ms:,.2f} ms "
            f"against {fastest.median_ms:,.2f} ms, {percent:.1f} % longer."
        )
        engines = int8_engines(inputs)
        engine = next((item for item in engines if item.batch_size == int8.batch_size), engines[0] if engines else None)
        if engine is not None:
            names = first_names(engine.int8.float_layers, LAYERS_IN_A_SENTENCE)
            count = (
                f"{len(engine.int8.float_layers)} of {engine.int8.layers} convolutions and linear layers ran in float"
            )
            sentence += f" {count}: {names};" if names else f" {count};"
            converted = first_names(engine.int8.reformat_layers, LAYERS_IN_A_SENTENCE)
            sentence += f" the engine converts between types {engine.int8.reformats} times"
            sentence += f": {converted}." if converted else "."
        sentences.append(sentence)
    return sentences


def run_warnings(inputs: ReportInputs) -> tuple[str, ...]:
    """Every warning of the run once, in the order of the stages."""
    groups = (inputs.warnings, inputs.draws.warnings, inputs.model.warnings, inputs.plan.warnings)
    return _unique(warning for group in (*groups, inputs.benchmark.warnings) for warning in group)


def images_per_draw(draws: CalibrationDraws) -> str:
    """Returns how many images a draw has, as one number or a range."""
    counts = sorted({len(draw) for draw in draws.indices})
    if not counts:
        return "0"
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"


def _unique(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))


def _speed_phrase(record: BenchmarkRecord) -> str:
    """The speed at the smallest batch size measured in both precisions; empty where there is none."""
    for batch_size in sorted({item.batch_size for item in record.measurements}):
        fp32, int8 = record.of("fp32", batch_size), record.of("int8", batch_size)
        if fp32 is not None and int8 is not None:
            ratio = fp32.median_ms / int8.median_ms
            if ratio >= 1:
                return f", and is {ratio_text(ratio)} times as fast at batch {batch_size}"
            return f", and takes {ratio_text(1 / ratio)} times as long at batch {batch_size}"
    return ""
