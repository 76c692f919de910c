"""`--counts`: what data decide, as shares of each count's maximum, typed or measured."""

from collections.abc import Sequence
from pathlib import Path

from policies.shown import shown


def parse_shares(texts: Sequence[str]) -> dict[str, float]:
    """The shares by count that `--counts` gives: `miss=0.4,keep=0.1`, or one file that `kvsim generate` recorded.

    Raises ValueError for anything else, both of them together included.
    """
    text = ",".join(texts)
    if Path(text).is_file():
        return measured_shares(Path(text))
    shares: dict[str, float] = {}
    for item in text.split(","):
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(
                f"--counts {shown(item)} is neither NAME=SHARE nor the one file of a recorded run, such as miss=0.4"
            )
        try:
            share = float(value)
        except ValueError:
            raise ValueError(
                f"--counts {shown(item)} must be a name and a share of its maximum, such as miss=0.4"
            ) from None
        if not 0 <= share <= 1:
            raise ValueError(f"--counts {shown(item)}: the share must be from 0 to 1")
        if name in shares:
            raise ValueError(f"--counts gives {shown(name)} twice; say it once")
        shares[name] = share
    return shares


def measured_shares(path: Path) -> dict[str, float]:
    """The mean shares of a recorded run; ValueError when the file is none, or nothing in it depended on data."""
    from traces.counts import Recording

    shares = Recording.load(path).shares()
    if not shares:
        raise ValueError(f"{path}: no count was drawn in this run; record a policy that draws some, such as shadowkv")
    return shares
