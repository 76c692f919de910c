"""The measured tables of docs/measured/ that simulations make: each module measures, and writes its page of a result.

`measure(limit)` runs what the page shows (on the first `limit` requests of each trace; None: as many as the page says)
and returns what goes into benchmarks/results/NAME.json; `page(result)` is the page in Markdown.
"""
