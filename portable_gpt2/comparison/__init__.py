"""Where two models part: traces, and their comparison tensor by tensor and op by op.

A `Trace` has the results of a model's ops for given tokens, by the names of `GPT2.trace`. `compare` judges a trace: are
the weights equal, is the result of each op within the bound of its error, and is the difference of the logits one that
rounding can cause?
"""
