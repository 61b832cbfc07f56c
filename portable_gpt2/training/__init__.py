"""Training, written once: AdamW on the loss, by each framework's gradients or by those of `gradients`.

``recipe`` says how, ``data`` is what it reads, ``optimizer`` and ``trainer`` are a step, ``run`` is its directory and
``loop`` the loop.
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
