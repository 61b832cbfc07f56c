"""Correctly rounded ops: a mode in which every op gives the same bits on every framework, device and processor."""
