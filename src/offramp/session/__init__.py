"""A store and a configuration become a plan, and the plan a running engine."""

from offramp.session.classifier import Classifier, Settings
from offramp.session.results import Result

__all__ = ["Classifier", "Result", "Settings"]
