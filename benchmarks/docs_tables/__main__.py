"""Measure the tables of docs/measured/ that simulations make, and write their results and pages.

python -m benchmarks.docs_tables                  all of them, some minutes of CPU time
python -m benchmarks.docs_tables tenants          one
python -m benchmarks.docs_tables --pages          only the pages, from the results that are kept
"""

import argparse
import json
import os
import sys

from benchmarks.docs_tables.pages import PAGES, TABLES, page_of, result_of
from benchmarks.docs_tables.runs import commit


def cpu_s() -> float:
    """CPU seconds of this process and of those that it waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main() -> None:
    """Measure what is asked for, one table after the other, and write every page of it."""
    os.environ.setdefault("KVSIM_COMPILE", "first")  # long runs: nothing is gained by beginning interpreted
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PAGES)}; default: all")
    parser.add_argument("--pages", action="store_true", help="write pages only")
    given = parser.parse_args()
    unknown = sorted(set(given.names) - PAGES.keys())
    if unknown:
        parser.error(f"no table is called {unknown[0]!r}; there are {', '.join(PAGES)}")
    measured = commit()  # of the code: what is written from here on is its result
    for name in given.names or PAGES:
        if name in TABLES and not given.pages:
            began_s = cpu_s()
            result = {"schema_version": 1, "commit": measured, **TABLES[name].measure(None)}
            result_of(name).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            sys.stdout.write(f"{name}: {cpu_s() - began_s:.0f} CPU s\n")
            sys.stdout.flush()
        page_of(name).write_text(PAGES[name](json.loads(result_of(name).read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
