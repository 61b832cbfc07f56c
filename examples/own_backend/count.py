"""Run GPT-2 on a backend of our own, which counts multiplications: ``python examples/own_backend/count.py``.

The model does not know the library `counting`. The adapter in `counting_backend` is the only code that connects them.
"""

import counting
import numpy as np

import portable_gpt2 as pg


def main():
    """Compare texts with NumPy's, and multiplications with the formula."""
    model = pg.GPT2.load("shakespeare", backend="counting")
    numpy = pg.GPT2.load("shakespeare", backend="numpy")
    text, expected = (each.generate("To be", max_new_tokens=20, seed=7) for each in (model, numpy))
    ids = [model.tokenizer.encode("To be, or not to be")]
    difference = np.abs(pg.to_numpy(model.logits(ids)) - numpy.logits(ids)).max()
    print(f"{model!r}\nThe text:         {text!r}\nEqual to NumPy's: {text == expected}")
    print(f"Largest difference from NumPy's logits: {difference:.1e}\n")

    c = model.config
    weights = c.n_layer * 12 * c.n_embd**2 + c.n_vocab * c.n_embd
    print("Multiplications in the matrix products, for the logits of n tokens, and the formula")
    print("n (12 n_layer n_embd² + n_vocab n_embd) + 2 n_layer n² n_embd:\n")
    print(f"   {'n':>4} {'counted':>13} {'formula':>13}")
    for n in (1, 16, 256):
        counting.multiplications = 0
        model.logits(np.zeros((1, n), int))
        attention = 2 * c.n_layer * n * n * c.n_embd  # the scores, and the product with the values
        print(f"   {n:4} {counting.multiplications:13,} {n * weights + attention:13,}")

    counting.multiplications = 0
    model.generate("To be", max_new_tokens=20, temperature=0)
    cached = counting.multiplications
    counting.multiplications = 0
    ids = model.tokenizer.encode("To be")
    for _ in range(20):
        ids.append(int(np.argmax(pg.to_numpy(model.logits([ids]))[0, -1])))
    print(
        f"\nTwenty tokens take {cached:,} multiplications with the cache, and {counting.multiplications:,} without it."
    )


if __name__ == "__main__":
    main()
