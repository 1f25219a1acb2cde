"""Training of exits together with their model. Torch is imported when training begins."""

from offramp.training.pipeline import is_first_process, train_exits
from offramp.training.settings import ExitMetrics, TrainSettings

__all__ = ["ExitMetrics", "TrainSettings", "is_first_process", "train_exits"]
