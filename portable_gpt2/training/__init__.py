"""Training, written once: AdamW, with the gradients of the framework or the hand-written ones of `gradients`.

``recipe`` has the options, ``data`` prepares texts, ``optimizer`` and ``trainer`` take a step, ``run`` keeps the
directory of a training run, and ``loop`` takes all steps of a run.
"""

from .data import batch, documents, train_tokenizer, windows, write_tokens
from .loop import Diverged, Report, train
from .optimizer import Moments, adamw, learning_rate
from .recipe import Recipe
from .run import Run
from .trainer import State, Trainer

__all__ = [
    "Diverged",
    "Moments",
    "Recipe",
    "Report",
    "Run",
    "State",
    "Trainer",
    "adamw",
    "batch",
    "documents",
    "learning_rate",
    "train",
    "train_tokenizer",
    "windows",
    "write_tokens",
]
