"""Generation: prefill and decode over a cache (`decoder`), and text out of tokens (`completion`)."""
