"""Kernels of the runtime that know no policy: they take tensors and ids.

`attention`: partial attention over a segment, and the merge of segments; `estimate`: the same over clusters, from what
is kept of each. `gather`: rows between memories. `scores`: chunks against queries. `select`: the best ids, and the
slots that they take; `residency`: the slots of a cache that outlives its last choice. These never wait for the GPU, so
that a decode step can be captured as a CUDA graph. `landmarks` and `lowrank`: what is kept of keys at the end of a
prompt. The `*_triton` modules are imported when the first CUDA tensor arrives.
"""
