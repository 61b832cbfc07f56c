"""Maps of attention: the pictures and their labels."""

import numpy as np
import pytest

from portable_gpt2 import plot

pytest.importorskip("matplotlib")

RANDOM = np.random.default_rng(0)


def test_a_map_shows_its_weights_beside_the_names_of_its_tokens():
    """Catches a map that is transposed, and tokens whose spaces, line ends and dollars are swallowed."""
    weights = np.tril(RANDOM.random((4, 4)))
    figure = plot.draw_attention(weights, ["To", " be", "\n", "$1"], "layer 3, head 5")
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), weights)
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["To", "␣be", "↵", r"\$1"]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("key", "query", "layer 3, head 5")


def test_a_long_text_is_labelled_where_there_is_room():
    """Catches labels that belong to other tokens, and a picture that grows without end."""
    n = 200
    figure = plot.draw_attention(np.eye(n), [str(i) for i in range(n)], "")
    axes = figure.axes[0]
    assert [int(label.get_text()) for label in axes.get_xticklabels()] == axes.get_xticks().tolist()
    assert len(axes.get_xticks()) <= 60
    assert max(figure.get_size_inches()) < 20


def test_training_is_drawn_where_it_is_known():
    """Catches curves that are exchanged, and steps without an evaluation drawn as if they had one."""
    metrics = [
        {"step": 0, "held_out": 5.0},
        {"step": 1, "loss": 4.0, "norm": 2.0, "rate": 1e-3},
        {"step": 2, "loss": 3.0, "norm": 0.5, "rate": 2e-3, "held_out": 3.5},
    ]
    losses, norms, rates = plot.draw_training(metrics, "$x").axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in losses.lines}
    assert drawn == {
        "training, at the end 3.000": [[1, 4.0], [2, 3.0]],
        "held-out, at the end 3.500": [[0, 5.0], [2, 3.5]],
    }
    for axes, values, label in ((norms, [2.0, 0.5], "norm of the\ngradient"), (rates, [1e-3, 2e-3], "learning rate")):
        [line] = axes.lines
        assert (line.get_xydata().tolist(), axes.get_ylabel()) == ([[1, values[0]], [2, values[1]]], label)
    assert (losses.get_title(), rates.get_xlabel()) == (r"\$x", "step")
    assert [len(axes.lines) for axes in plot.draw_training(metrics[:1]).axes] == [1, 0, 0]  # stopped at once


def test_a_grid_shows_every_map_under_its_name():
    """Catches a grid that is empty, or that leaves maps out."""
    maps = {f"layer {i}": RANDOM.random((3, 3)) for i in range(5)}
    figure = plot.draw_grid(maps, 2, "To be")
    shown = {axes.get_title(): axes.images[0].get_array() for axes in figure.axes if axes.images}
    assert list(shown) == list(maps)
    for name, weights in maps.items():
        np.testing.assert_array_equal(shown[name], weights)
