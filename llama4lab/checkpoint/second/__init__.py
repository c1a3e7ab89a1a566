"""A second way from the bytes of a checkpoint to numbers, to check the first by; it is slow and shares no code with it.

`schemes`, `recognition` and `layouts` turn whole tensors. Here each number is looked up by itself, by its row and its
column, as the definition of a format says it.
"""
