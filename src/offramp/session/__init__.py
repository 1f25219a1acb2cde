"""A store and a configuration become a plan, and the plan a running engine."""

from offramp.session.classifier import Classifier, Result, Settings

__all__ = ["Classifier", "Result", "Settings"]
