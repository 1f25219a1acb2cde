"""The session of a store: a configuration becomes a plan, and the plan a running engine."""

from offramp.session.classifier import Classifier, Settings
from offramp.session.results import Result
from offramp.session.session import prepare, prepare_engine

__all__ = ["Classifier", "Result", "Settings", "prepare", "prepare_engine"]
