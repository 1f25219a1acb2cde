"""Training of exits together with their model. Torch is imported when training begins."""

from offramp.training.pipeline import train_exits
from offramp.training.settings import ExitMetrics, TrainSettings, is_first_process

__all__ = ["ExitMetrics", "TrainSettings", "is_first_process", "train_exits"]
