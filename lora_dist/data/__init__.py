"""From texts to micro-batches: packing and its cache (`text`), the global data cursor (`sampler`), batches (`loader`).

Plain values in, tensors out: this room knows its rank and world as two integers and touches no process group.
"""
