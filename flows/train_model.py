"""An image folder in, an FP32 checkpoint out: what `ptq train` and the demo run before quantizing."""

from pathlib import Path

from prefect import flow, runtime

from ptq.config import ModelConfig, TrainingConfig
from ptq.records.data import TrainingRecord
from tasks.runtime.context import StageContext
from tasks.stages.data import index_images, prepare_split
from tasks.stages.model import take_own_preprocessing
from tasks.stages.training import deliver_checkpoint, train_classifier


@flow(name="train-model")
def train_model(config: TrainingConfig, store: str, threads: int = 0) -> TrainingRecord:
    """Train an FP32 classifier on the calibration split.

    1. index and decode images   2. train   3. write the checkpoint
    """
    # Of the network's own weights there may be none yet.
    named = ModelConfig(name=config.model, checkpoint=config.checkpoint or config.output)
    config = config.model_copy(update={"data": take_own_preprocessing(named, config.data, store)[0]})
    run = StageContext(store_uri=store, run_id=runtime.flow_run.name)
    splits, decoding = config.data.splits, config.data.preprocessing.decoding
    data = index_images(config.data.path, splits, run=run)
    train = prepare_split(data, splits.calibration_split, decoding, run=run)
    has_held_out = any(split.split == splits.selection_split for split in data.splits)
    held_out = prepare_split(data, splits.selection_split, decoding, run=run) if has_held_out else None
    trained = train_classifier(config, data, train, held_out, threads=threads, run=run)
    deliver_checkpoint(trained, str(Path(config.output)), run=run)
    return trained
