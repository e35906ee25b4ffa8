"""Text from a model."""

from .generate import generate as generate
from .generate import stream as stream
from .results import compute_transition_scores as compute_transition_scores
