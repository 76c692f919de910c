"""The page of what a decode step costs the host, which `benchmarks/decode_overhead.py` measures."""

from typing import Any

from benchmarks.docs_tables.markdown import paragraph, table


def page(result: dict[str, Any]) -> str:
    """A row for each policy."""
    rows = [
        [f"`{row['policy']}`", f"{row['plan_us']:,.1f}", f"{row['bound_us']:,.1f}", f"{row['step_ms']:,.1f}"]
        for row in result["rows"]
    ]
    return (
        "# What a decode step costs the host\n\n"
        + paragraph(
            "Measured by `python benchmarks/decode_overhead.py`, written by",
            "`python -m benchmarks.docs_tables decode_overhead` from `benchmarks/results/decode_overhead.json` (commit "
            f"{result['commit']}; {result['machine']}, torch {result['torch']}, Transformers "
            f"{result['transformers']}).",
            f"A Llama of {result['layers']} layers so small that its kernels take next to nothing, one CPU thread, a "
            f"prompt of {result['prompt_tokens']:,} tokens, {result['steps']} steps, CPU time. *Plan*: a layer's plan "
            "derived anew; *bound*: the same answer from a plan that was derived once, of which the runtime asks for "
            "each layer and token; *step*: the median of whole forwards of one token.",
        )
        + "\n"
        + table(("policy", "plan, us", "bound, us", "step, ms"), rows)
    )
