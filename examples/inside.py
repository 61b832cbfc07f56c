"""Look inside the model in the package, with NumPy alone: ``python examples/inside.py ["a text"]``.

It prints where attention looks, how large the residual stream becomes, and the logit lens: the tokens that the model
would predict if it ended after each layer (nostalgebraist, "interpreting GPT: the logit lens", 2020).
"""

import sys

import numpy as np

import portable_gpt2 as pg

TEXT = "To be, or not to be, that is the question"


def main(text=TEXT):
    """Print what the layers of the model compute for a text."""
    model = pg.GPT2.load("shakespeare", backend="numpy")
    trace = model.trace(text)
    tokens = [model.tokenizer.decode([i]) for i in model.tokenizer.encode(text)]
    print(f"{model!r}\ntokens: {tokens}\n")
    print("trace[name] holds the intermediate arrays. Those of the first layer:")
    for name, x in trace.items():
        if not name.startswith("h") or name.startswith("h0"):
            print(f"   {name:20} {list(x.shape)}")

    print("\nWhich token does each head of each layer look at most, from the last token?")
    for layer in range(model.config.n_layer):
        weights = np.asarray(trace[f"h{layer}/attn/weights"])  # [batch, heads, queries, keys]
        last = weights[0, :, -1, :]
        seen = [f"{tokens[j]!r} {row[j]:.2f}" for row, j in zip(last, last.argmax(axis=-1), strict=True)]
        print(f"   layer {layer}: {', '.join(seen)}")

    print("\nThe logit lens: what would the model predict after the last token, if it ended after each layer?")
    params = model.params
    for layer in range(model.config.n_layer):
        # The residual stream after the layer, at the last token.
        stream = np.asarray(trace[f"h{layer}/residual"])[0, -1]
        logits = pg.unembed(pg.layer_norm(stream, **params["ln_f"]), params["wte"])
        probabilities = pg.softmax(logits)
        best = np.argsort(-probabilities)[:4]
        likely = ", ".join(f"{model.tokenizer.decode([i])!r} {probabilities[i]:.2f}" for i in best.tolist())
        print(f"   layer {layer}: |x| = {np.linalg.norm(stream):6.1f}   {likely}")
    assert np.allclose(logits, np.asarray(trace["logits"])[0, -1], atol=1e-4)  # the last layer's are the model's


if __name__ == "__main__":
    main(*sys.argv[1:])
