"""The benchmark: ours beside the peers that are installed, in one run. ``python -m bench --help`` says how.

`__main__` conducts. What computes does so in a process of its own (`worker`), a framework each; two sides are measured
in turn (`clock`). What is ours and what is the framework's own stand in `model` and `frameworks`, the other libraries
in `peers`. A figure is a `rows.Row`; what issue 3 demands of it stands in `bounds`, what becomes of it in `report` and
`plots`.
"""
