"""Generation: tokens from a model (`decoder`), text from tokens (`detokenizer`), both for a batch (`completion`)."""
