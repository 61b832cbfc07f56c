"""Pages that a browser shows offline: `attention` of a text, and the `surprise` of a model at each token of a text.

A page is one file. It loads nothing from the network, follows the reader's choice of light or dark colours, fits on the
screen of a phone, and is operated with a mouse, by touch or with the keyboard.
"""

from .attention_page import attention
from .document import Page
from .surprise_page import surprise

__all__ = ["Page", "attention", "surprise"]
